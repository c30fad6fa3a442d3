"""Processes that begin in milliseconds: forks of a server that has imported torch, which takes a
new one five seconds."""
import multiprocessing


def fork_context():
    """A multiprocessing context whose server has imported what tests need, if it is the first to
    start one in this process."""
    context = multiprocessing.get_context("forkserver")
    # torch.optim.AdamW imports torch._dynamo
    context.set_forkserver_preload(["pytest", "torch._dynamo", "train", "sft", "eval_niah",
                                    "tools.prepare"])
    return context
