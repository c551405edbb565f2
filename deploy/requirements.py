"""Print what the product needs, one requirement a line: `python requirements.py pyproject.toml EXTRA...`."""

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in sys.argv[2:] for requirement in project["optional-dependencies"][extra]]
    print("\n".join([*project["dependencies"], *extras]))
