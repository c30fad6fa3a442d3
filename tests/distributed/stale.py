"""Worker: train.py on two ranks of which the second sees an older state of the run directory."""
import os
import sys
from pathlib import Path

import train

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        newest = train.checkpoints
        train.checkpoints = lambda run: newest(Path(run))[:1]
    train.main(train.stage1_parser(), train.stage1_datasets, sys.argv[1:])
