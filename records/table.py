"""Write the settings table of `python train_gpt.py --help` into README.md.

    python records/table.py
"""
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def with_table(readme: str, table: str) -> str:
    """The README with the table between its two markers."""
    block = f"<!-- settings -->\n{table}\n<!-- end of settings -->"
    text, count = re.subn(r"<!-- settings -->.*?<!-- end of settings -->", lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise SystemExit("error: README.md needs one pair of <!-- settings --> and <!-- end of settings -->")
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import train_gpt

    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8"), train_gpt.Hyperparameters.table()), encoding="utf-8")
