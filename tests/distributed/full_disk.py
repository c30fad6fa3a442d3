"""Worker: train.py on a disk that is full when the fourth step's checkpoint is written."""
import sys

import model
import train

if __name__ == "__main__":
    original = model.save_tensors

    def full(file, tensors):
        if "checkpoint-00000004" in str(file) and file.name.startswith("exp_avg-"):
            raise OSError(28, "No space left on device", str(file))
        original(file, tensors)

    model.save_tensors = full
    train.main(train.stage1_parser(), train.stage1_datasets, sys.argv[1:])
