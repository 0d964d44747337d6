"""PagedAdamW: equal in bits to what it stands for, whatever the paging; and a true torch optimizer."""

import copy
import gc
import io
import os
import pickle
import sys
import weakref

import pytest
import torch

from qlora_ref import native, optim, optim_ops, pager_managed, pager_stores
from qlora_ref.optim import PagedAdamW
from qlora_ref.reference.adamw import AdamWScalars, adamw_step, adamw_step_8bit, encode_moments
from qlora_ref.testing.compare import assert_bits_equal

SHAPES = ((50, 70), (7,), (150, 33), (), (0,), (513,), (4, 5, 6))
TINY = dict(page_bytes=4096, pool_bytes=8192)  # the smallest pool there is: two pages
KINDS = [(torch.float32, 32), (torch.bfloat16, 32), (torch.float32, 8), (torch.bfloat16, 8)]
KIND_IDS = ["f32", "bf16", "f32-8bit", "bf16-8bit"]
LAYOUTS = {
    "none": {},
    "two pages": dict(paging="cpu", **TINY),
    "five pages": dict(paging="cpu", page_bytes=8192, pool_bytes=5 * 8192),
    "large pool": dict(paging="cpu"),
}


def parameters(dtype=torch.float32, seed=0, shapes=SHAPES, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [p.requires_grad_() for p in made]


def set_grads(params, step, missing=True):
    """Gradients that depend on `step` only; some parameters have none in some steps."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = None if missing and (step * 3 + i) % 7 == 0 else grad


def train(optimizer, params, steps, missing=True):
    for step in steps:
        set_grads(params, step, missing)
        optimizer.step()


def assert_same(params, others, what=""):
    for i, (a, b) in enumerate(zip(params, others, strict=True)):
        assert_bits_equal(a, b, f"{what} parameter {i}")


def assert_same_state(state, other):
    """Two state_dicts, entry by entry."""
    assert state["state"].keys() == other["state"].keys()
    for number, entry in state["state"].items():
        assert entry.keys() == other["state"][number].keys()
        for name, value in entry.items():
            assert_bits_equal(value, other["state"][number][name], f"{name} of {number}")


# --- what it computes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_torch_fused(layout):
    """float32: parameters and states of torch.optim.AdamW(fused=True), with groups and missing gradients."""
    ours, theirs = parameters(), parameters()

    def groups(params):
        return [{"params": params[:3]}, {"params": params[3:], "lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.0}]

    paged = PagedAdamW(groups(ours), lr=1e-3, **LAYOUTS[layout])
    torchs = torch.optim.AdamW(groups(theirs), lr=1e-3, fused=True)
    train(paged, ours, range(6)), train(torchs, theirs, range(6))
    assert_same(ours, theirs)
    assert_same_state(paged.state_dict(), torchs.state_dict())
    assert paged.state_dict()["param_groups"] == torchs.state_dict()["param_groups"]


def test_page_boundaries_do_not_round_differently():
    """A page starts at a multiple of 64 elements; torch's vector loop then has the same tail as on the
    whole."""
    ours, theirs = parameters(shapes=[(1_000_013,)]), parameters(shapes=[(1_000_013,)])
    paged = PagedAdamW(ours, paging="cpu", page_bytes=1 << 16, pool_bytes=16 << 16)
    torchs = torch.optim.AdamW(theirs, fused=True)
    train(paged, ours, range(3), missing=False), train(torchs, theirs, range(3), missing=False)
    assert_same(ours, theirs)
    assert_same_state(paged.state_dict(), torchs.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, bits", KINDS[1:], ids=KIND_IDS[1:])
def test_equals_the_reference(dtype, bits, layout):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = PagedAdamW(ours, lr=1e-2, bits=bits, **LAYOUTS[layout])
    moments = [(torch.zeros(p.numel()), torch.zeros(p.numel())) for p in theirs]
    states, counts = [encode_moments(*m) if bits == 8 else m for m in moments], [0] * len(theirs)
    for step in range(5):
        set_grads(ours, step), set_grads(theirs, step)
        optimizer.step()
        for i, (p, state) in enumerate(zip(theirs, states, strict=True)):
            if p.grad is None:
                continue
            counts[i] += 1
            scalars = AdamWScalars(counts[i], lr=1e-2)
            flat, grad = p.detach().view(-1), p.grad.view(-1)
            if bits == 8:
                adamw_step_8bit(flat, grad, state, scalars)
            else:
                adamw_step(flat, grad, *state, scalars)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype, bits", KINDS, ids=KIND_IDS)
def test_paging_changes_nothing(dtype, bits, monkeypatch):
    """Any pool, grown and shrunk by resuming into another layout: the bits of the unpaged run. On the
    reference too."""
    runs = []
    for backend in ("native", "reference"):
        if backend == "reference":
            monkeypatch.setattr(torch.ops.qlora_ref, "adamw_", optim_ops._adamw)
            monkeypatch.setattr(torch.ops.qlora_ref, "adamw_8bit_", optim_ops._adamw_8bit)
        params, state = parameters(dtype), None
        for i, layout in enumerate(LAYOUTS.values()):
            optimizer = PagedAdamW(params, bits=bits, **layout)
            if state is not None:
                optimizer.load_state_dict(state)
            train(optimizer, params, range(2 * i, 2 * i + 2))
            state = optimizer.state_dict()
        runs.append(params)
    plain = parameters(dtype)
    train(PagedAdamW(plain, bits=bits), plain, range(2 * len(LAYOUTS)))
    for params in runs:
        assert_same(params, plain)


def test_one_call_a_window_and_group(monkeypatch):
    calls = []
    monkeypatch.setattr(optim, "update_pieces", lambda bits, rows, group: calls.append((group["lr"], len(rows))))
    params = parameters(shapes=[(1024,)] * 8)  # two pages each
    optimizer = PagedAdamW([{"params": params[:3], "lr": 1.0}, {"params": params[3:], "lr": 2.0}], paging="cpu", **TINY)
    train(optimizer, params, range(1), missing=False)
    assert calls == [(1.0, 1)] * 6 + [(2.0, 1)] * 10  # a window of one page
    calls.clear()
    optimizer = PagedAdamW([{"params": params[:3], "lr": 1.0}, {"params": params[3:], "lr": 2.0}], page_bytes=4096)
    train(optimizer, params, range(1), missing=False)
    assert calls == [(1.0, 6), (2.0, 10)]  # all resident: one window


def test_gradient_accumulation_and_closure():
    ours, theirs = parameters(shapes=[(50, 3)]), parameters(shapes=[(50, 3)])
    x = torch.randn(20, 50)
    for params, optimizer in (
        (ours, PagedAdamW(ours, paging="cpu", **TINY)),
        (theirs, torch.optim.AdamW(theirs, fused=True)),
    ):

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            for part in x.split(5):
                (part @ params[0]).square().mean().backward()
            return (x @ params[0]).square().mean()

        losses = [optimizer.step(closure).item() for _ in range(4)]
        assert losses[-1] < losses[0]
        assert params[0].grad is not None
        optimizer.zero_grad()
        assert params[0].grad is None
    assert_same(ours, theirs)


def test_learning_rate_schedule():
    ours, theirs = parameters(), parameters()
    for params, optimizer in (
        (ours, PagedAdamW(ours, lr=0.1)),
        (theirs, torch.optim.AdamW(theirs, lr=0.1, fused=True)),
    ):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        for step in range(5):
            train(optimizer, params, [step])
            schedule.step()
    assert_same(ours, theirs)


# --- paging
# ------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_closed_form():
    """12 pages, a pool of 5: 12 faults, then 7 a step; every eviction writes one page back."""
    params = parameters(shapes=[(12 * 512,)])
    optimizer = PagedAdamW(params, paging="cpu", page_bytes=4096, pool_bytes=5 * 4096)
    train(optimizer, params, range(1, 5), missing=False)
    faults, evictions = 12 + 3 * 7, 7 + 3 * 7
    stats = optimizer.stats()
    assert (stats.faults, stats.evictions) == (faults, evictions)
    assert (stats.bytes_to_device, stats.bytes_to_host) == (4096 * faults, 4096 * evictions)
    assert optimizer.memory() == {"device": 5 * 4096, "host": 12 * 4096}


def test_states_that_fit_never_move_again():
    params = parameters()
    optimizer = PagedAdamW(params, paging="cpu")
    train(optimizer, params, range(1))
    before = copy.copy(optimizer.stats())
    train(optimizer, params, range(1, 5))
    assert optimizer.stats() == before and before.faults == 1


def test_page_out():
    """Between steps: device memory given back, nothing lost, the next step as if nothing had been."""
    ours, theirs = parameters(), parameters()
    optimizer = PagedAdamW(ours, paging="cpu", page_bytes=4096, pool_bytes=1 << 20)
    for step in range(4):
        train(optimizer, ours, [step])
        optimizer.page_out()
        assert optimizer.memory()["device"] == 0
    train(torch.optim.AdamW(theirs, fused=True), theirs, range(4))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype, bits", KINDS, ids=KIND_IDS)
def test_late_streams(dtype, bits, monkeypatch):
    """The whole optimizer over streams in adversarial order (tests/test_paging.py), nothing waited for
    between steps."""
    from test_paging import Simulation

    for seed in range(4):
        simulation = Simulation(seed)
        monkeypatch.setattr(pager_stores, "make_lanes", lambda device, s=simulation: tuple(s.lanes))
        ours, theirs = parameters(dtype), parameters(dtype)
        late = PagedAdamW(ours, bits=bits, paging="cpu", page_bytes=4096, pool_bytes=(2 + seed) * 4096)
        train(late, ours, range(4))
        state = late.state_dict()
        simulation.lanes[0].synchronize()
        monkeypatch.undo()
        plain = PagedAdamW(theirs, bits=bits)
        train(plain, theirs, range(4))
        assert_same(ours, theirs)
        assert_same_state(state, plain.state_dict())


def test_memory_is_freed():
    params = parameters()
    optimizer = PagedAdamW(params, paging="cpu", **TINY)
    train(optimizer, params, range(2))
    (states,) = optimizer._device_states.values()
    pages = [weakref.ref(t) for t in (states.pages.store.pool, *states.pages.store.host)]
    assert len(pages) > 18
    del optimizer, states
    gc.collect()
    assert not any(page() is not None for page in pages)


# --- checkpoints
# -------------------------------------------------------------------------------------------------


def saved(state):
    """Through torch.save, as a checkpoint would go."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_checkpoints_interchange(direction):
    """Three steps with one, two more with the other: the bits of five with torch's."""
    kinds = [lambda p: PagedAdamW(p, paging="cpu", **TINY), lambda p: torch.optim.AdamW(p, fused=True)]
    if direction == "from torch":
        kinds.reverse()
    ours, theirs = parameters(), parameters()
    first = kinds[0](ours)
    train(first, ours, range(3))
    second = kinds[1](ours)
    second.load_state_dict(saved(first.state_dict()))
    train(second, ours, range(3, 5))
    train(torch.optim.AdamW(theirs, fused=True), theirs, range(5))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype, bits", KINDS, ids=KIND_IDS)
def test_resume_is_exact_and_stays_paged(dtype, bits):
    ours, theirs = parameters(dtype), parameters(dtype)
    first = PagedAdamW(ours, bits=bits, paging="cpu", **TINY)
    train(first, ours, range(3))
    state = saved(first.state_dict())
    for entry in state["state"].values():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(
            type(t) is torch.Tensor and t.device.type == "cpu" and t.dtype == torch.float32 for t in entry.values()
        )
    resumed = PagedAdamW(ours, bits=bits, paging="cpu", **TINY)
    resumed.load_state_dict(state)
    assert resumed.memory()["device"] == 0 and resumed.memory()["host"] == first.memory()["host"]
    assert all(set(entry) == {"step"} for entry in resumed.state.values()), "no moment outside the pages"
    assert_same_state(resumed.state_dict(), state)
    train(resumed, ours, range(3, 6))
    train(PagedAdamW(theirs, bits=bits), theirs, range(6))
    assert_same(ours, theirs)


def test_loading_replaces_everything():
    """Into a used optimizer: states that the checkpoint lacks start from zero again."""
    params = parameters(shapes=[(40,), (50,)])
    empty = PagedAdamW(params, paging="cpu", **TINY).state_dict()
    optimizer = PagedAdamW(params, paging="cpu", **TINY)
    train(optimizer, params, range(3), missing=False)
    optimizer.load_state_dict(empty)
    assert optimizer.state_dict()["state"] == {}
    before = [p.detach().clone().requires_grad_() for p in params]
    train(optimizer, params, [9], missing=False)
    train(torch.optim.AdamW(before, fused=True), before, [9], missing=False)
    assert_same(params, before)


def test_8bit_and_32bit_checkpoints():
    """32-bit states load into an 8-bit optimizer (rounded) and 8-bit ones into a 32-bit optimizer
    (decoded)."""
    params = parameters()
    wide, narrow = PagedAdamW(params), PagedAdamW(params, bits=8)
    train(wide, params, range(2))
    narrow.load_state_dict(wide.state_dict())
    state = narrow.state_dict()
    for number, entry in wide.state_dict()["state"].items():
        codes = encode_moments(entry["exp_avg"].view(-1), entry["exp_avg_sq"].view(-1))
        for mine, expected in zip(state[optim.CODES_KEY][number], codes, strict=True):
            assert_bits_equal(mine, expected)
    wide.load_state_dict(state)
    assert_same_state(wide.state_dict(), state)


def test_hooks_see_the_moments():
    params = parameters()
    optimizer, seen = PagedAdamW(params), []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(set(state["state"][0])))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(type(state["state"][0]["exp_avg"])))
    train(optimizer, params, range(1, 3), missing=False)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [{"step", "exp_avg", "exp_avg_sq"}, torch.Tensor]


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_added_or_unfrozen_later(bits):
    """The pages are laid out anew and the states of the others kept, exactly: as if all had been there from the start
    and had only lacked gradients."""
    ours, theirs = parameters(), parameters()
    ours[1].requires_grad_(False)
    grown = PagedAdamW(ours[:4], bits=bits, paging="cpu", **TINY)
    complete = PagedAdamW([{"params": theirs[:4]}, {"params": theirs[4:], "lr": 1e-2}], bits=bits)
    for step in range(6):
        if step == 2:
            grown.add_param_group({"params": ours[4:], "lr": 1e-2})
        if step == 4:
            ours[1].requires_grad_(True)
        for params in (ours, theirs):
            set_grads(params, step, missing=False)
            for p in [*(params[1:2] if step < 4 else []), *(params[4:] if step < 2 else [])]:
                p.grad = None
        grown.step(), complete.step()
    assert_same(ours, theirs)
    assert_same_state(grown.state_dict(), complete.state_dict())


def test_dtensor():
    """FSDP2's parameters: this rank's shard is what is updated and saved."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = parameters(shapes=[(64, 33)])
        sharded = [torch.nn.Parameter(DTensor.from_local(plain[0].detach().clone(), mesh, [Shard(0)]))]
        optimizer = PagedAdamW(sharded, paging="cpu", **TINY)
        reference = torch.optim.AdamW(plain, fused=True)
        for step in range(3):
            set_grads(plain, step, missing=False)
            sharded[0].grad = DTensor.from_local(plain[0].grad.clone(), mesh, [Shard(0)])
            optimizer.step(), reference.step()
            optimizer.load_state_dict(optimizer.state_dict())
        assert_bits_equal(sharded[0].to_local(), plain[0])
        assert_same_state(optimizer.state_dict(), reference.state_dict())
    finally:
        torch.distributed.destroy_process_group()


# --- what it refuses
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, word",
    [
        (dict(lr=-1.0), "lr must not be negative"),
        (dict(eps=float("nan")), "eps must not be negative"),
        (dict(betas=(0.9, 1.0)), "two numbers in"),
        (dict(bits=4), "32 or 8 bits"),
        (dict(paging="disk"), "paging is one of"),
        (dict(page_bytes=5000), "power of two"),
        (dict(pool_bytes=4 << 20, page_bytes=4 << 20), "less than two pages"),
        (dict(paging="pinned"), "'pinned' is for CUDA"),
        (dict(paging="managed"), "'managed' is for CUDA"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        PagedAdamW(parameters(), **arguments)


def test_bad_parameters_and_gradients():
    with pytest.raises(TypeError, match="float16"):
        PagedAdamW(parameters(torch.float16))
    with pytest.raises(ValueError, match="not contiguous"):
        PagedAdamW([torch.zeros(4, 3).T.requires_grad_()])
    optimizer = PagedAdamW(parameters())
    with pytest.raises(TypeError, match="float64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.float64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        PagedAdamW(embedding.parameters()).step()


def test_frozen_parameters_are_left_alone():
    """model.parameters() with packed uint8 weights among them, as torch's AdamW allows."""
    frozen = torch.nn.Parameter(torch.zeros(1000, dtype=torch.uint8), requires_grad=False)
    params = parameters(shapes=[(10,)])
    optimizer = PagedAdamW([frozen, *params], page_bytes=4096)
    train(optimizer, params, range(1, 3), missing=False)
    assert optimizer.memory()["device"] == 4096


def test_bad_checkpoints_change_nothing():
    params = parameters(shapes=[(10,), (20,)])
    optimizer = PagedAdamW(params)
    train(optimizer, params, range(1, 3), missing=False)
    good = optimizer.state_dict()
    wrong_shape, missing, amsgrad, groups = (copy.deepcopy(good) for _ in range(4))
    wrong_shape["state"][1]["exp_avg"] = torch.zeros(21)
    del missing["state"][0]["exp_avg_sq"]
    amsgrad["param_groups"][0]["amsgrad"] = True
    groups["param_groups"] *= 2
    for bad, word in (
        (wrong_shape, r"parameter 1 of shape \(20,\), exp_avg is \(21,\)"),
        (missing, "exp_avg_sq is missing"),
        (amsgrad, "amsgrad=True"),
        (groups, "different number of parameter groups"),
    ):
        with pytest.raises(ValueError, match=word):
            optimizer.load_state_dict(bad)
        assert_same_state(optimizer.state_dict(), good)


def test_no_copy_and_no_pickle():
    optimizer = PagedAdamW(parameters())
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use state_dict\(\)"):
            attempt(optimizer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_guard():
    """In a child, the pages are the parent's: every use is refused with a sentence."""
    params = parameters()
    optimizer = PagedAdamW(params, paging="cpu", **TINY)
    train(optimizer, params, range(2))
    read, write = os.pipe()
    if os.fork() == 0:
        refused = []
        for use in (optimizer.step, optimizer.state_dict, optimizer.page_out):
            try:
                use()
            except RuntimeError as error:
                refused.append("in a fork" in str(error))
        os.write(write, bytes([refused == [True] * 3]))
        os._exit(0)
    assert os.read(read, 1) == b"\x01"
    os.wait()
    train(optimizer, params, range(2, 3))


# --- a memory spike
# --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the bytes of live tensors in a Linux process")
def test_peak_of_a_step_is_bounded_by_the_pool():
    """The claim behind paging, on tensors that exist rather than on a card: during a step no more state is in
    use at once than the pool holds, and outside a step, after page_out, none. 40 pages of states, a pool of
    4."""
    params = parameters(shapes=[(40 * 512,)])
    optimizer = PagedAdamW(params, paging="cpu", page_bytes=4096, pool_bytes=4 * 4096)
    seen = []
    states = optimizer._device_states
    original = optim.update_pieces

    def watch(bits, rows, group):
        pool = next(iter(states.values())).pages.store.pool
        inside = range(pool.data_ptr(), pool.data_ptr() + pool.nbytes)
        seen.append(all(field.data_ptr() in inside for row in rows for field in row[2:4]))
        original(bits, rows, group)

    optim.update_pieces = watch
    try:
        train(optimizer, params, range(1, 3), missing=False)
    finally:
        optim.update_pieces = original
    assert len(seen) == 2 * 20 and all(seen)
    assert optimizer.memory() == {"device": 4 * 4096, "host": 40 * 4096}
    optimizer.page_out()
    assert optimizer.memory()["device"] == 0


GIB = 1 << 30


@pytest.mark.gpu
@pytest.mark.parametrize("paging", ["pinned", "managed"])
def test_spike_survival(paging):
    """An emulated small card: torch may take only a fraction of this one. The states (512 MiB) and an
    activation spike do not fit together. AdamW fails; the paged run completes with the bits of a run without
    a spike.

    The card itself is never short: managed memory is at most 1 GiB, and on the host before the spike.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    elements = 64 * 2**20  # 256 MiB of parameters; states 512 MiB
    cap = int(1.5 * GIB)
    if free < 8 * GIB:
        pytest.skip(f"{free / GIB:.1f} GiB are free on the GPU; this test wants 8, to be far from its limit")
    if paging == "managed":
        try:
            concurrent = pager_managed.Driver().concurrent_access(device.index)
        except RuntimeError as error:
            pytest.skip(str(error))
        if not concurrent:
            pytest.skip("this GPU has no concurrent managed access")

    def run(make, spike_bytes, page_out=False):
        torch.cuda.empty_cache()
        params = [torch.ones(elements, device=device, requires_grad=True)]
        optimizer = make(params)
        for step in range(3):
            params[0].grad = torch.full_like(params[0], 0.1 * (step + 1))
            optimizer.step()
            params[0].grad = None
            if page_out:
                optimizer.page_out()
            if spike_bytes:
                spike = torch.empty(spike_bytes, dtype=torch.uint8, device=device)
                spike.fill_(1)
                torch.cuda.synchronize()
                del spike
        return params[0].detach().cpu()

    def paged(params):
        return PagedAdamW(params, paging=paging, pool_bytes=64 << 20)

    spike = cap - 400 * 2**20  # with the parameters it fits, with the states as well it does not
    unspiked = run(lambda p: torch.optim.AdamW(p, fused=True), 0)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(cap / total, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            run(lambda p: torch.optim.AdamW(p, fused=True), spike)
        gc.collect()
        survived = run(paged, spike, page_out=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert_bits_equal(survived, unspiked)


@pytest.mark.gpu
@pytest.mark.parametrize("paging", ["none", "pinned", "managed"])
@pytest.mark.parametrize("dtype, bits", KINDS, ids=KIND_IDS)
def test_on_a_card(dtype, bits, paging):
    """float32: torch's fused AdamW on this device. Else: the same optimizer on the CPU, which is the
    reference."""
    if (dtype, bits) != KINDS[0] and native.cuda is None:
        pytest.skip(f"no CUDA kernels: {native.missing['cuda']}")
    shapes = ((3000, 700), (7,), (1000, 333), (513,))
    ours = parameters(dtype, shapes=shapes, device="cuda")
    optimizer = PagedAdamW(ours, bits=bits, paging=paging, page_bytes=2 << 20, pool_bytes=6 << 20)
    if (dtype, bits) == KINDS[0]:
        theirs = parameters(dtype, shapes=shapes, device="cuda")
        other = torch.optim.AdamW(theirs, fused=True)
    else:
        theirs = parameters(dtype, shapes=shapes)
        other = PagedAdamW(theirs, bits=bits)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            train(optimizer, ours, range(3))
        torch.cuda.synchronize()
        train(other, theirs, range(3))
    assert_same(ours, theirs)
    on_cpu = {k: {name: t.cpu() for name, t in e.items()} for k, e in other.state_dict()["state"].items()}
    assert_same_state(optimizer.state_dict(), {"state": on_cpu})
