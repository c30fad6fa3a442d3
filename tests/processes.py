"""Processes that begin in milliseconds: forks of a server that has imported torch, which takes a new one five seconds."""
import multiprocessing


def server():
    """A multiprocessing context; torch.distributed's launcher and tools.prepare take the same server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._dynamo", "train", "sft", "eval_niah", "tools.prepare"])  # AdamW takes the second
    return context
