"""Worker: train.py on two machines whose --out is not one file system: the second rank's name ends
in .1."""
import os
import sys

import train

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        arguments[arguments.index("--out") + 1] += ".1"
    train.main(arguments)
