"""Write logs of the full size of Steam and YooChoose in their official formats, and time reading them.

    python tests/big_logs.py FOLDER [--scale 1.0]

The contents are random; sizes, users, items and line lengths are those of the real files. Prints
seconds and peak memory of the first load, and seconds of the second, which reads the parsed copy.
"""

import argparse
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
CHUNK = 500_000
MEASURE = """
import sys, time
sys.path.insert(0, {root!r})
from data import load_dataset
from prebert import peak_memory_gb
began = time.perf_counter()
data = load_dataset({name!r}, {folder!r})
print(f"{name}: {{data.taken['interactions']}}, {{data.num_users:,}} users, {{data.num_items:,}} items: "
      f"{{time.perf_counter() - began:.1f}} s, peak {{peak_memory_gb():.1f}} GiB")
"""


def write_yoochoose(path: Path, clicks: int, chance: np.random.Generator) -> None:
    sizes = chance.geometric(1 / 3.6, int(clicks / 3.6))
    sessions = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    seconds = np.repeat(chance.integers(0, 180 * 86400, len(sizes)), sizes) * 1000 + np.arange(len(sessions)) % 997 * 60
    items = 214_500_000 + (chance.pareto(0.8, len(sessions)) * 30).astype(np.int64) % 52_739
    with open(path, "w") as file:
        for begin in range(0, len(sessions), CHUNK):
            part = slice(begin, begin + CHUNK)
            times = np.datetime_as_string(np.datetime64("2014-04-01T00:00:00.000") + seconds[part]).tolist()
            rows = zip(sessions[part].tolist(), times, items[part].tolist(), strict=True)
            file.write("".join(f"{session},{when}Z,{item},0\n" for session, when, item in rows))


def write_steam(path: Path, reviews: int, chance: np.random.Generator) -> None:
    users = (chance.pareto(1.1, reviews) * reviews / 40).astype(np.int64) % (reviews // 3)
    items = (chance.pareto(0.8, reviews) * 60).astype(np.int64) % 15_474
    days = np.datetime64("2010-10-15") + chance.integers(0, 2600, reviews)
    words = np.array([
        "it\\'s", 'a "game"', "{fun}", "u\\'product_id\\': 7", "caf\\xe9", "good", "10/10", "play", "would",
    ])  # fmt: skip
    texts = [" ".join(words[chance.integers(0, len(words), 40)]) for _ in range(1000)]
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
        for begin in range(0, reviews, CHUNK):
            part = slice(begin, begin + CHUNK)
            rows = zip(users[part].tolist(), items[part].tolist(), days[part].astype(str).tolist(), strict=True)
            file.write("".join(
                f"{{u'username': u'user {user}', u'hours': 1.5, u'products': 7, u'product_id': u'{item}', "
                f"u'page_order': 0, u'date': u'{day}', u'text': u'{texts[(user + item) % 1000]}', "
                f"u'early_access': False, u'page': 1}}\n"
                for user, item, day in rows
            ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    args = parser.parse_args()
    chance = np.random.default_rng(0)
    writers = {
        "yoochoose": ("yoochoose-clicks.dat", write_yoochoose, 33_003_944),
        "steam": ("steam_reviews.json.gz", write_steam, 7_793_069),
    }
    for name, (file, write, lines) in writers.items():
        path = args.folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write(path, int(lines * args.scale), chance)
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
        script = MEASURE.format(root=str(ROOT), name=name, folder=str(args.folder))
        for _ in range(2):
            subprocess.run([sys.executable, "-c", script], cwd=args.folder, env=os.environ, check=True)


if __name__ == "__main__":
    main()
