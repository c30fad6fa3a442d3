"""The real step on fake CUDA tensors: memory and traffic are the plan's, nothing is on the wrong
device.

    python -m pytest tests/test_fake_cuda.py              # a selection, as in CI
    python -m pytest tests/test_fake_cuda.py -m slow      # every grid of docs/memory.md: minutes
"""
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fake_cuda import fake_cuda, rank_of
from steps import SHAPE

import model as model_py
import parallel
from benchmarks.plans import planned_grids
from data import Batch
from eval_niah import Prompt, Reader, predict
from model import Llama, ModelConfig, read_config
from parallel import ShardedAdamW
from tools.plan import DEVICES, Plan
from tools.plan import parser as plan_parser
from train import build as build_run
from train import save_checkpoint, training_step

ROOT = Path(__file__).resolve().parent.parent
LLAMA = read_config(ROOT / "runs" / "llama31_8b.json")
LARGE = read_config(ROOT / "runs" / "llama31_70b.json")
QUICK = [  # kernel, length, tp, cp, dp, recompute, offload, offload_optimizer
    ("flash", 2**17, 8, 4, 8, "mlp", False, False),  # the paper's grid at 1M
    ("cudnn", 2**17, 2, 8, 2, "none", False, False),
    ("cudnn", 2**16, 1, 8, 8, "mlp", True, False),
    ("fa3", 2**16, 1, 8, 1, "block", False, False),
    ("cudnn", 2**13, 1, 2, 1, "block", False, True),
    ("flash", 2**13, 8, 1, 1, "none", False, False),  # stage 2 on a node of eight
]
quick = []
for kernel, length, tp, cp, dp, *memory in QUICK:
    quick.append(Plan(LLAMA, length, 1, 1, tp, cp, dp, 2, *memory, kernel=kernel))
quick.append(replace(quick[-1], micro_batch=4))
for plan in (quick[1], quick[4]):
    quick.append(replace(plan, config=replace(LLAMA, model_type="qwen3")))


def every_grid() -> list[Plan]:
    plans = [plan for _, plan in planned_grids(LLAMA, DEVICES["H100-80"])]
    plans.append(Plan(LARGE, 2**20, 8, 1, 8, 32, 1, recompute="mlp", offload=True))
    return plans


def name(plan: Plan) -> str:
    words = [plan.kernel, f"{plan.length // 1024}K", f"tp {plan.tp}", f"cp {plan.cp}",
             f"dp {plan.dp}", plan.recompute]
    if plan.config.qk_norm:
        words.append("qwen3")
    if plan.micro_batch > 1:
        words.append(f"{plan.micro_batch} rows")
    if plan.offload:
        words.append("offload")
    if plan.offload_optimizer:
        words.append("on_host")
    return " ".join(words)


def on_the_gpu(llama: type[Llama], config: ModelConfig, grid) -> Llama:
    """A model that is born there, in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda:0"):
            return llama(config, grid)
    finally:
        torch.set_default_dtype(torch.float32)


def build(plan: Plan, grid, layers: int) -> Llama:
    model = on_the_gpu(Llama, replace(plan.config, num_hidden_layers=layers), grid)
    model.recompute = plan.recompute
    model.offload = plan.offload
    model.tile = plan.tile
    return model


@contextmanager
def fake_rank(kernel: str, tp: int = 1, cp: int = 1, dp: int = 1, rank: int = 0):
    """(grid, meter) of one rank, whose attention is by `kernel`."""
    with rank_of(tp, cp, dp, rank) as grid, fake_cuda(fa3=kernel == "fa3") as meter:
        grid.kernel = kernel
        yield grid, meter


def step(plan: Plan, layers: int) -> Counter:
    """Of one step on the last rank: peak bytes by device, bytes sent by group; "moved", bytes that
    forward and backward move in the device's memory."""
    tokens = torch.zeros(plan.micro_batch, plan.length, dtype=torch.int64)
    place = (plan.tp, plan.cp, plan.dp, plan.processes - 1)
    with fake_rank(plan.kernel, *place) as (grid, meter):
        model = build(plan, grid, layers)
        optimizer = ShardedAdamW(model, grid, on_host=plan.offload_optimizer)
        meter.peak.clear()
        grid.sent.clear()
        meter.moved = 0
        training_step(model, optimizer, Batch(tokens, tokens), plan.micro_batch)
        moved = Counter(moved=meter.moved)
        optimizer.step(1e-4, 1.0)
    assert meter.kernels == {plan.kernel}
    return meter.peak + grid.sent + moved


def compare(plan: Plan) -> None:
    """Layers are alike: two and three are run, the rest lies on the line through them."""
    plan = replace(plan, batch=plan.dp * plan.micro_batch)  # a micro-batch each
    two, three = step(plan, 2), step(plan, 3)
    found = Counter()
    for key in three:
        found[key] = three[key] + (three[key] - two[key]) * (plan.config.num_hidden_layers - 3)
    memory = plan.memory()
    assert found["cuda"] == pytest.approx(sum(memory.values()), rel=0.015), memory
    assert found["cpu"] == pytest.approx(plan.on_host(), rel=0.01)
    assert found["moved"] == pytest.approx(plan.pointwise(), rel=0.2)
    traffic = plan.traffic()
    others = found["dp"] + found["dp_cp"] + found["all"] + found["cp_tp"]
    for axis, sent in (("tp", found["tp"]), ("cp", found["cp"]), ("dp", others)):
        assert sent == pytest.approx(traffic[axis], rel=0.01, abs=2**20), axis


@pytest.mark.parametrize("plan", quick, ids=name)
def test_the_plan_is_what_the_real_step_takes(plan):
    compare(plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", every_grid(), ids=name)
def test_the_plan_is_what_the_real_step_takes_on_every_grid(plan):
    compare(plan)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("cp, rank", [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 3)])
def test_documents_masked_apart_take_no_more_memory_than_one(cp, rank, kv_heads):
    """In backward, where the most is needed, and send as much: so what is planned, one document,
    suffices for all."""
    length = 2**16

    def attention(rows: int, segments: list[list[int]] | None = None) -> tuple[int, int]:
        """Peak bytes of a pass forward and back, and bytes sent."""
        with fake_rank("flash", cp=cp, rank=rank) as (grid, meter):
            q, k, v, d_out = (
                torch.empty(rows, length // cp, heads, 128, device="cuda:0", dtype=torch.bfloat16)
                .transpose(1, 2) for heads in (8, kv_heads, kv_heads, 8))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = parallel.ring_attention(*leaves, grid, segments)
            torch.autograd.grad(out, leaves, d_out)
            return meter.peak["cuda"], grid.sent["cp"]

    one, two, uneven = [0, length], [0, 7000, length], [0, 1, length]
    many = list(range(0, length + 1, 2**12))
    eighth = [0, length // 8, length]
    for segments in ([one], [two], [eighth], [uneven], [many], [one, two], [uneven, many]):
        peak, sent = attention(len(segments))
        masked_peak, masked_sent = attention(len(segments), segments)
        assert masked_peak <= 1.002 * peak  # a slice of the log-sum-exp is copied
        assert masked_sent == sent


# ------------------------------------------------------------------------------ planted mix-ups

MODULES = ("rope_yarn", "parallel", "data", "model", "train")
MIX_UPS = {  # of a module: what is there, what is put in its place
    "positions_on_the_host": (
        "model", "        positions = positions.to(self.head_weight.device)\n", ""),
    "frequencies_on_the_host": (
        "rope_yarn", "    inv_freq = inv_freq.to(positions.device)\n", ""),
    "own_positions_on_the_host": ("model", "        own = own.to(positions.device)\n", ""),
    "stop_tokens_on_the_host": (
        "model", "torch.tensor(stop_tokens, dtype=torch.int64, device=device)",
        "torch.tensor(stop_tokens, dtype=torch.int64)"),
    "done_on_the_host": (
        "model", "torch.zeros(batch, dtype=torch.bool, device=device)",
        "torch.zeros(batch, dtype=torch.bool)"),
    "last_places_on_the_host": (
        "model", "unread.shape[1] - 1, device=device)", "unread.shape[1] - 1)"),
    "batch_on_the_host": (
        "train", "batch.part(rows, length).to(device)", "batch.part(rows, length)"),
    "number_of_targets_on_the_host": (
        "train", "(batch.targets != -100).sum()), device=device)",
        "(batch.targets != -100).sum()))"),
    "validation_batch_on_the_host": (
        "train", "data.batch(dataset, index, 1).to(device)", "data.batch(dataset, index, 1)"),
    "gradients_meet_masters_on_the_host": (
        "parallel", "gradients[name].to(master.device)", "gradients[name]"),
    "masters_sent_from_the_host": (
        "parallel", "self.masters[name].to(parameter.device, parameter.dtype)",
        "self.masters[name].to(parameter.dtype)"),
    "state_sent_from_the_host": (
        "parallel", "self.join(piece.to(parameter.device), parameter.shape)",
        "self.join(piece, parameter.shape)"),
    "lse_of_cudnn_as_flash_has_it": ("parallel", "out, lse[..., None], unused", "out, lse, unused"),
    "lse_of_a_hop_is_a_slice": ("parallel", "lse = lse.contiguous()", "lse = lse"),
    "lse_of_cudnn_leaves_as_it_comes": (
        "parallel", "return out, lse.reshape(q.shape[:3])", "return out, lse"),
    "cudnn_out_and_lse_swapped": (
        "parallel", "d_out, q, k, v, out, lse[..., None]", "d_out, q, k, v, lse[..., None], out"),
    "out_and_lse_swapped": (
        "parallel", "d_out, q, k, v, out, lse, None",
        "d_out, q, k, v, lse, out, None"),
}
# what is noticed must be the mix-up
COMPLAINT = ("on the same device|two different devices|NCCL takes no host tensor|"
             "fused AdamW takes one device|(out|lse) has shape|as if it were contiguous|"
             "broadcast a dimension")


class OneSequence:
    """A dataset of zeros."""

    sequence_length = 512
    document_mask = False

    def sequence(self, index: int):
        tokens = torch.zeros(513, dtype=torch.int64).numpy()
        return tokens, tokens == 0, tokens


def load(module: str, source: str) -> ModuleType:
    loaded = importlib.util.module_from_spec(importlib.util.spec_from_loader(module, None))
    sys.modules[module] = loaded
    exec(compile(source, f"{module}.py", "exec"), loaded.__dict__)
    return loaded


@contextmanager
def loaded_again(changed: str, old: str, new: str) -> Iterator[dict[str, ModuleType]]:
    """The project's modules with one's source changed, under their own names inside `with`. (To put
    the whole of sys.modules back would take away what torch has imported meanwhile, for good.)"""
    before = {module: sys.modules[module] for module in MODULES}
    loaded = {}
    try:
        for module in MODULES:
            source = (ROOT / f"{module}.py").read_text()
            if module == changed:
                assert source.count(old) == 1, source.count(old)
                source = source.replace(old, new)
            loaded[module] = load(module, source)
        yield loaded
    finally:
        sys.modules.update(before)


def run_everything(kernel: str, changed: str = "", old: str = "", new: str = "") -> None:
    """A step with everything offloaded, state saved and loaded, validation, generation, with one
    module's source changed."""
    with loaded_again(changed, old, new) as loaded:
        changed_model, train = loaded["model"], loaded["train"]
        config = changed_model.ModelConfig.from_hf(SHAPE | {"num_hidden_layers": 1})
        tokens = torch.zeros(2, 512, dtype=torch.int64)  # cuDNN takes chunks of 128
        with fake_rank(kernel, 2, 2, 2, 5) as (grid, meter):
            model = on_the_gpu(changed_model.Llama, config, grid)
            model.recompute, model.offload = "mlp", True
            optimizer = loaded["parallel"].ShardedAdamW(model, grid, on_host=True)
            train.training_step(model, optimizer, Batch(tokens, tokens), 1)
            optimizer.step(1e-4, 1.0)
            for kind in optimizer.KINDS:
                optimizer.load_state(kind, optimizer.state(kind), 1)
            train.validate(model, OneSequence(), 2)
            assert meter.kernels == {kernel}
            model.generate(tokens.to("cuda:0"), 2, stop_tokens=(1,))


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_nothing_is_on_the_wrong_device(kernel):
    run_everything(kernel)


@pytest.mark.parametrize("tp, cp, length", [(2, 2, 2048), (3, 2, 1536), (3, 1, 1536)])
def test_a_row_that_ends_early_is_computed_by_the_same_kernel(tp, cp, length):
    """Its last 1,036 targets carry no loss: what is computed is whole chunks all the same, and
    tp 3's padding does not make other ones of them."""
    tokens = torch.zeros(1, length, dtype=torch.int64)
    targets = tokens.clone()
    targets[:, -1036:] = -100
    shape = SHAPE | {"num_hidden_layers": 1}
    if tp == 3:
        shape |= {"vocab_size": 513, "hidden_size": 96, "intermediate_size": 162,
                  "num_attention_heads": 6, "num_key_value_heads": 3}
    with fake_rank("cudnn", tp, cp, rank=tp * cp - 1) as (grid, meter):
        model = on_the_gpu(Llama, ModelConfig.from_hf(shape), grid)
        optimizer = ShardedAdamW(model, grid)
        training_step(model, optimizer, Batch(tokens, targets), 1)
    assert meter.kernels == {"cudnn"}


def test_packed_samples_of_stage_2(monkeypatch):
    """--pack: the host reads borders from document ids of the device (where fake ones have none, so
    these are made up). This rank has positions 16 ... 47: a block for each sample there, and one
    for the row whose sample began before them."""
    borders = [[0, 16, 64], [0, 40, 64]]
    lengths = []

    def document_segments(ids):
        assert ids.is_cuda
        assert parallel.document_segments(ids) == [[0, 64], [0, 64]]
        return borders

    def block_forward(q, *more, **others):
        lengths.append(tuple(q.shape[:3:2]))
        return computed(q, *more, **others)

    computed = parallel.block_forward
    monkeypatch.setattr(model_py, "document_segments", document_segments)
    monkeypatch.setattr(parallel, "block_forward", block_forward)
    rows = torch.zeros(2, 64, dtype=torch.int64)
    with fake_rank("flash", tp=2, cp=2, rank=3) as (grid, meter):
        model = on_the_gpu(Llama, ModelConfig.from_hf(SHAPE | {"num_hidden_layers": 1}), grid)
        optimizer = ShardedAdamW(model, grid)
        training_step(model, optimizer, Batch(rows, rows, document_ids=rows), 2)
        optimizer.step(1e-4, 1.0)
    assert lengths == [(1, 32), (1, 24), (1, 8), (1, 24)]
    assert meter.kernels == {"flash"}


@pytest.mark.parametrize("planted", MIX_UPS)
def test_a_planted_mix_up_is_noticed(planted):
    with pytest.raises((RuntimeError, AssertionError), match=COMPLAINT):
        run_everything("cudnn" if "cudnn" in planted else "flash", *MIX_UPS[planted])


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_a_checkpoint_is_loaded_trained_and_evaluated(kernel, model_directory, tmp_path):
    """Files of one process on a CPU, read by a rank of eight: weights, optimizer state; then a step
    and needles, of which the second prompt finds the first one's keys and values in the cache."""
    words = ["H100-80", "--model", str(model_directory), "--sequence-length", "512", "--recompute",
             "mlp", "--offload", "--offload-optimizer", "--device", "cuda", "--tp", "2"]
    options = plan_parser().parse_args(words)
    saved = Llama.from_pretrained(model_directory)
    checkpoint = save_checkpoint(tmp_path, 7, saved, ShardedAdamW(saved, saved.grid), {}, {},
                                 keep=1)
    rows = torch.zeros(2, 512, dtype=torch.int64)
    with fake_rank(kernel, 2, 2, 2, 5) as (grid, meter):
        model, optimizer = build_run(saved.config, checkpoint, 7, grid, torch.bfloat16, options)
        assert model.head_weight.is_cuda
        assert {x.device.type for x in optimizer.masters.values()} == {"cpu"}
        training_step(model, optimizer, Batch(rows, rows), 1)
        optimizer.step(1e-4, 1.0)
        reader = Reader(model)
        for length in (512, 400):
            prompt = Prompt([0] * length, length - 3, 8, "48213", "passkey", None)
            answers = predict(reader, [prompt] * 2)
            assert [len(answer) for answer in answers] == [4, 4]
        assert 0 < reader.computed < reader.read
    assert kernel in meter.kernels
