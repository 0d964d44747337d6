"""AdamW: the reference against torch, the C++ kernel and the (emulated) CUDA kernel against the reference.
Class EXACT."""

import ctypes
import math
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from qlora_ref import native, optim_ops
from qlora_ref.backend import Backend
from qlora_ref.reference import adamw as ref
from qlora_ref.reference.adamw import AdamWScalars, adamw_step, adamw_step_8bit, decode_moments, encode_moments
from qlora_ref.reference.double_quant import get_map8
from qlora_ref.testing.compare import assert_bits_equal

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
SIZES = (0, 1, 2, 63, 255, 256, 257, 511, 4099)
SETTINGS = [
    dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8),
    dict(lr=2e-4, beta1=0.5, beta2=0.95, weight_decay=0.0, eps=1e-6),  # lerp from the gradient's end
    dict(lr=1.0, beta1=0.0, beta2=0.0, weight_decay=0.1, eps=1e-8),
]


def problem(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """param, grad, m, v of n elements: gradients over 12 decades, exact zeros, subnormals, one outlier."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, generator=generator)

    grad = normal() * torch.logspace(-10, 2, n)
    m, v = normal() * 0.1, normal().square() * 0.01
    if n > 8:
        grad[3] = m[3] = v[3] = 0.0
        grad[5], m[6], v[7] = 1e-42, -1e-41, 1e-43
        grad[8] = 3e4
    return normal().to(dtype), grad.to(dtype), m, v


# --- the reference
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "beta1=.5", "no memory"])
def test_equals_torch_loop(settings):
    """torch.optim.AdamW(foreach=False), bit for bit, given torch's square root (MKL's, which is not
    IEEE's)."""
    param, _, m, v = problem(10_007, torch.float32)
    m, v, theirs = torch.zeros_like(m), torch.zeros_like(v), param.clone().requires_grad_()
    betas = settings["beta1"], settings["beta2"]
    arguments = {name: settings[name] for name in ("lr", "weight_decay", "eps")}
    optimizer = torch.optim.AdamW([theirs], betas=betas, foreach=False, **arguments)
    for step in range(1, 6):
        theirs.grad = problem(10_007, torch.float32, seed=step)[1]
        optimizer.step()
        adamw_step(param, theirs.grad, m, v, AdamWScalars(step, **settings), sqrt=torch.sqrt)
        assert_bits_equal(m, optimizer.state[theirs]["exp_avg"], f"exp_avg, step {step}")
        assert_bits_equal(v, optimizer.state[theirs]["exp_avg_sq"], f"exp_avg_sq, step {step}")
        assert_bits_equal(param, theirs, f"param, step {step}")


def test_ieee_sqrt_is_correctly_rounded():
    """r = RN(sqrt(x)) means x lies between the squares of r's neighbouring midpoints; in exact integers."""
    x = torch.cat([problem(4099, torch.float32)[3], torch.tensor([1.0, 2.0, 3.4e38, 1.2e-38, 1e-45])])
    for value, root in zip(x.tolist(), ref.ieee_sqrt(x).tolist(), strict=True):
        if value == 0:
            assert root == 0
            continue
        half_ulp = 2.0 ** (math.frexp(root)[1] - 25)
        square = int(value * 2**200)  # x is a multiple of 2^-149
        low, high = (int((root + sign * half_ulp) * 2**100) for sign in (-1, 1))
        assert low * low < square < high * high


def test_fma_rounds_once():
    """Against exact rational arithmetic, with products that fall on and beside the midpoints of float32."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(1)
    a = 1 + torch.randint(0, 2**23, (2000,), generator=generator) * 2.0**-23
    b = 1 + torch.randint(0, 2**11, (2000,), generator=generator) * 2.0**-23
    c = torch.randn(2000, generator=generator) * torch.logspace(-30, 8, 2000)
    a, b = a.float(), b.float()
    c[::3] = (-(a.double() * b.double())[::3]).float()  # cancellation: the sum is the product's rounding error
    got = torch.stack([ref.fma(float(a[i]), b[i : i + 1], c[i : i + 1])[0] for i in range(len(a))])
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below = torch.tensor(result).nextafter(torch.tensor(-torch.inf)).item()
        above = torch.tensor(result).nextafter(torch.tensor(torch.inf)).item()
        error = abs(exact - Fraction(result))
        assert error <= abs(exact - Fraction(below)) and error <= abs(exact - Fraction(above))


@DTYPES
def test_error_of_one_step(dtype):
    """Against float64: each of m, v is within 4 roundings, the update within 8, then one rounding of the
    parameter."""
    settings = SETTINGS[0]
    param, grad, m, v = problem(4099, dtype)
    theta, g, m64, v64 = (t.double() for t in (param, grad, m, v))
    b1, b2 = settings["beta1"], settings["beta2"]
    m64_new, v64_new = b1 * m64 + (1 - b1) * g, b2 * v64 + (1 - b2) * g * g
    adamw_step(param, grad, m, v, AdamWScalars(3, **settings))

    u, tiny = 2.0**-24, 2.0**-149
    assert ((m.double() - m64_new).abs() <= 4 * u * (b1 * m64.abs() + (1 - b1) * g.abs()) + tiny).all()
    assert ((v.double() - v64_new).abs() <= 4 * u * v64_new + 2 * tiny).all()
    denominator = v.double().sqrt() / (1 - b2**3) ** 0.5 + settings["eps"]
    update = settings["lr"] / (1 - b1**3) * m.double() / denominator
    kept = theta * (1 - settings["lr"] * settings["weight_decay"])
    last = u if dtype == torch.float32 else 2.0**-8
    bound = 8 * u * update.abs() + 3 * u * kept.abs() + last * (kept - update).abs() + tiny
    assert ((param.double() - (kept - update)).abs() <= bound).all()


# --- 8-bit states
# --------------------------------------------------------------------------------------------------


def test_moments_are_nearest_entries():
    """Every code decodes to a nearest entry, the lower of two at a tie; absmax is that of the block."""
    _, _, m, v = problem(4099, torch.float32)
    codes_m, absmax_m, codes_v, absmax_v = encode_moments(m, v)
    for x, codes, absmax, name in ((m, codes_m, absmax_m, "dynamic"), (v, codes_v, absmax_v, "dynamic_unsigned")):
        padded = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
        assert_bits_equal(absmax, padded.abs().amax(1), f"absmax {name}")
        levels = get_map8(name).levels.double()
        s = (x * (1 / absmax).repeat_interleave(256)[: len(x)]).double()  # one reciprocal a block, in float32
        distance = (s[:, None] - levels).abs()
        chosen = distance.gather(1, codes[:, None].long())[:, 0]
        midpoint_rounding = 2.0**-24 * s.abs()
        guarded = (codes == 1) & (name == "dynamic_unsigned")
        assert ((chosen <= distance.amin(1) + midpoint_rounding) | guarded).all()


def test_zero_gradient_does_not_drift():
    """bitsandbytes' CPU table stores an exact 0 as 2e-5 absmax, and such coordinates wander off (8.2e-4 in
    200 steps)."""
    n = 512
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0))
    grad[::7] = 0
    param = torch.zeros(n)
    states = encode_moments(torch.zeros(n), torch.zeros(n))
    for step in range(1, 51):
        adamw_step_8bit(param, grad, states, AdamWScalars(step, lr=1e-3, weight_decay=0.0))
    assert (param[::7] == 0).all() and (param[grad != 0] != 0).all()


def test_small_coordinates_do_not_explode(monkeypatch):
    """One gradient 10^4 above its neighbours: their v would round to 0 and m / eps would be the update. The
    encoder's guard bounds it; without the guard the same run leaves the float32 run by orders of
    magnitude."""

    def largest_move():
        n, generator = 256, torch.Generator().manual_seed(0)
        scale = torch.full((n,), 1e-4)
        scale[0] = 1.0
        param, exact = torch.zeros(n), torch.zeros(n)
        states, m, v = encode_moments(torch.zeros(n), torch.zeros(n)), torch.zeros(n), torch.zeros(n)
        for step in range(1, 31):
            grad = torch.randn(n, generator=generator) * scale
            scalars = AdamWScalars(step, lr=1e-3, weight_decay=0.0)
            adamw_step_8bit(param, grad, states, scalars)
            adamw_step(exact, grad, m, v, scalars)
        return param[1:].abs().max().item(), exact.abs().max().item()

    guarded, exact = largest_move()
    assert guarded <= exact  # smaller steps, where v is rounded up

    def unguarded(m, v):
        fields = ref.quantize_8bit(m, get_map8("dynamic"), 256)
        return *fields, *ref.quantize_8bit(v, get_map8("dynamic_unsigned"), 256)

    monkeypatch.setattr(ref, "encode_moments", unguarded)
    assert largest_move()[0] > 10 * exact


def test_non_finite_moments_stay_visible():
    """A NaN gradient poisons its block, as in the float32 optimizer it poisons its element; it is never
    lost."""
    param, grad, m, v = problem(600, torch.float32)
    states = encode_moments(m, v)
    grad[300] = torch.nan
    adamw_step_8bit(param, grad, states, AdamWScalars(1, lr=1e-3))
    m, v = decode_moments(*states)
    assert param.isnan().nonzero().flatten().tolist() == [300]
    assert m[256:512].isnan().all() and v[256:512].isnan().all() and m[:256].isfinite().all()


# --- native kernels
# --------------------------------------------------------------------------------------------------


class Emulated(Backend):
    """src/cuda/adamw.cu on CPU tensors, through tests/cuda_emulator.h. Not a GPU run."""

    device_type = "cpu"

    def _call(self, function, device, *args):
        if isinstance(args[0], bytes):
            row = 48 if function.__name__ == "adamw" else 64
            args = (args[0], len(args[0]) // row, *args[1:])
        function(*args)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed, so the CUDA kernel cannot be emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # what a card punishes and a CPU forgives, as in emulated_cuda.py
    flags += ["-fsanitize=alignment,bounds,shift", "-fsanitize-undefined-trap-on-error", "-Wno-clobbered"]
    flags += ["-x", "c++", "-include", str(ROOT / "tests/cuda_emulator.h")]
    library = tmp_path_factory.mktemp("adamw") / "emulated.so"
    sources = [str(ROOT / "src/cuda/adamw.cu"), str(ROOT / "tests/adamw_emulated.cpp")]
    built = subprocess.run([compiler, *flags, *sources, "-shared", "-o", str(library)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(library))
    head = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int] + [ctypes.c_double] * 5
    loaded.adamw.argtypes, loaded.adamw_8bit.argtypes = [*head, ctypes.c_int], [*head, ctypes.c_void_p]
    loaded.adamw.restype = loaded.adamw_8bit.restype = None
    return Emulated(SimpleNamespace(adamw=loaded.adamw, adamw_8bit=loaded.adamw_8bit))


@pytest.fixture(params=[*(native.cpu_variants() or ["cpu"]), "emulated"])
def backend(request):
    """Every variant of the CPU kernels that this machine has, then the CUDA kernels."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated")
        return
    if native.cpu is None:
        pytest.skip(f"no C++ kernels: {native.missing['cpu']}")
    before = native.module.cpu.variant()
    native.set_cpu_variant(request.param)
    yield native.cpu
    native.set_cpu_variant(before)


GUARD = 64


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `tensor` with poisoned elements on both sides, and the poison."""
    fill = 77 if tensor.dtype == torch.uint8 else 7.0
    around = torch.full((GUARD + tensor.numel() + GUARD,), fill, dtype=tensor.dtype)
    around[GUARD : GUARD + tensor.numel()] = tensor
    return around[GUARD : GUARD + tensor.numel()], around


def assert_guards(around: torch.Tensor) -> None:
    fill = 77 if around.dtype == torch.uint8 else 7.0
    assert (around[:GUARD] == fill).all() and (around[-GUARD:] == fill).all(), "wrote outside"


@DTYPES
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "beta1=.5", "no memory"])
def test_native(backend, dtype, settings):
    """Several runs of elements in one call, each with its own step, three steps."""
    problems = [problem(n, dtype, seed=n) for n in SIZES]
    ours = [[guarded(t) for t in p] for p in problems]
    for count in range(3):
        steps = [torch.tensor(float(1 + count + 10 * k)) for k in range(len(SIZES))]
        for k, (param, grad, m, v) in enumerate(problems):
            adamw_step(param, grad, m, v, AdamWScalars(1 + count + 10 * k, **settings))
        columns = [[run[i][0] for run in ours] for i in range(4)]
        backend.adamw(*columns, steps, **settings)
        for expected, run in zip(problems, ours, strict=True):
            for name, e, (actual, around) in zip(["param", "grad", "m", "v"], expected, run, strict=True):
                assert_bits_equal(actual, e, f"{name} of {e.numel()}, step {count + 1}")
                assert_guards(around)


@DTYPES
def test_native_8bit(backend, dtype):
    settings = SETTINGS[0]
    problems = [problem(n, dtype, seed=n) for n in SIZES]
    states = [encode_moments(m, v) for _, _, m, v in problems]
    ours = [[guarded(t) for t in (p, g, *s)] for (p, g, _, _), s in zip(problems, states, strict=True)]
    for count in range(3):
        for (param, grad, _, _), s in zip(problems, states, strict=True):
            adamw_step_8bit(param, grad, s, AdamWScalars(1 + count, **settings))
        columns = [[run[i][0] for run in ours] for i in range(6)]
        backend.adamw_8bit(*columns, [torch.tensor(1.0 + count)] * len(SIZES), **settings)
        for (param, grad, _, _), s, run in zip(problems, states, ours, strict=True):
            for name, e, (actual, around) in zip(range(6), (param, grad, *s), run, strict=True):
                assert_bits_equal(actual, e, f"tensor {name} of {param.numel()}, step {count + 1}")
                assert_guards(around)


@DTYPES
def test_native_8bit_ragged_tail(backend, dtype):
    """The last block is short, and its moments almost vanish in this step: what lies behind them must not count."""
    n = 259
    param, grad, m, v = torch.ones(n).to(dtype), torch.full((n,), -9.0).to(dtype), torch.ones(n), torch.ones(n)
    grad[-1] = -9.25
    states = encode_moments(m, v)
    ours = [t.clone() for t in (param, grad, *states)]
    adamw_step_8bit(param, grad, states, AdamWScalars(1, **SETTINGS[0]))
    assert states[1][1] < 0.1  # 0.9 - 0.1 * 9.25
    backend.adamw_8bit(*[[t] for t in ours], [torch.tensor(1.0)], **SETTINGS[0])
    for name, e, actual in zip(range(6), (param, grad, *states), ours, strict=True):
        assert_bits_equal(actual, e, f"tensor {name}")


def assert_8bit_step(backend, param, grad, states, settings, steps=1):
    """`steps` steps of the reference, and of the backend on copies: every tensor has the same bits after each."""
    ours = [t.clone() for t in (param, grad, *states)]
    names = "param", "grad", "m codes", "m absmax", "v codes", "v absmax"
    for step in range(1, 1 + steps):
        adamw_step_8bit(param, grad, states, AdamWScalars(step, **settings))
        backend.adamw_8bit(*[[t] for t in ours], [torch.tensor(float(step))], **settings)
        for name, e, actual in zip(names, (param, grad, *states), ours, strict=True):
            assert_bits_equal(actual, e, f"{name}, step {step}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-39, 3e20, 3e38])
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "beta1=.5", "no memory"])
def test_native_8bit_extremes(backend, settings, value):
    """Non-finite, subnormal and huge gradients in one block, the neighbours untouched. 3e20 gives a v, and with
    no memory 3e38 gives an m, whose reciprocal is subnormal: such a block is divided."""
    param, grad, m, v = problem(700, torch.float32)
    grad[300] = value
    assert_8bit_step(backend, param, grad, encode_moments(m, v), settings, steps=2)


@DTYPES
def test_native_8bit_blocks(backend, dtype):
    """Whole blocks of zeros, of subnormal gradients, of NaN, with states that hold every code, and a tail of
    zeros."""
    param, grad, m, v = problem(5 * 256 + 9, dtype)
    grad[:256] = m[:256] = v[:256] = 0
    grad[256:512], m[256:512], v[256:512] = 1e-40, 0, 0
    grad[512:768] = torch.nan
    grad[-9:] = m[-9:] = v[-9:] = 0
    states = encode_moments(m, v)
    for codes in (states[0], states[2]):
        codes[768:1024] = torch.arange(256)
    assert_8bit_step(backend, param, grad, states, SETTINGS[0], steps=3)


@pytest.mark.parametrize("scale", [1.0, 1.7e19, 3.1e38], ids=["one", "large v", "large m"])
def test_native_8bit_beside_the_thresholds(backend, scale):
    """With beta1 = beta2 = 0 the new moments are g and g^2: on every threshold of both maps and one ulp off,
    unscaled, and where v or m is divided by an absmax whose reciprocal is subnormal."""
    around = []
    for name, root in (("dynamic", False), ("dynamic_unsigned", True)):
        thresholds = get_map8(name).thresholds
        x = thresholds.double().sqrt().float() if root else thresholds
        around += [x, x.nextafter(torch.tensor(2.0)), x.nextafter(torch.tensor(-2.0))]
    grad = torch.cat(around).view(-1, 255)
    grad = torch.cat([grad, torch.ones(len(grad), 1)], dim=1).flatten() * scale
    zeros = torch.zeros_like(grad)
    assert_8bit_step(backend, zeros.clone(), grad, encode_moments(zeros, zeros), SETTINGS[2])


@DTYPES
def test_threads_give_the_same_bits(backend, dtype):
    """More elements than one thread takes, and a rest."""
    before = torch.get_num_threads()
    param, grad, m, v = problem(5 * 16384 + 300, dtype)
    states = encode_moments(m, v)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            run, run_8bit = ([t.clone() for t in fields] for fields in ((param, grad, m, v), (param, grad, *states)))
            backend.adamw(*[[t] for t in run], [torch.tensor(2.0)], **SETTINGS[0])
            backend.adamw_8bit(*[[t] for t in run_8bit], [torch.tensor(2.0)], **SETTINGS[0])
            results.append([*run, *run_8bit])
    finally:
        torch.set_num_threads(before)
    adamw_step(param, grad, m, v, AdamWScalars(2, **SETTINGS[0]))
    for a, b, name in zip(*results, range(10), strict=True):
        assert_bits_equal(a, b, f"tensor {name}")
    for a, e in zip(results[0][:4], (param, grad, m, v), strict=True):
        assert_bits_equal(a, e)


@DTYPES
def test_more_runs_than_one_launch_takes(emulated, dtype):
    """200 runs: the emulator has the 4 KiB of kernel parameters of CUDA 12, so three or four launches."""
    problems = [problem(1 + k % 5, dtype, seed=k) for k in range(200)]
    ours = [[t.clone() for t in p] for p in problems]
    emulated.adamw(*map(list, zip(*ours, strict=True)), [torch.tensor(2.0)] * 200, **SETTINGS[0])
    for k, (expected, actual) in enumerate(zip(problems, ours, strict=True)):
        adamw_step(*expected, AdamWScalars(2, **SETTINGS[0]))
        for e, a in zip(expected, actual, strict=True):
            assert_bits_equal(a, e, f"run {k}")


@pytest.mark.parametrize("offset", [1, 2, 3])
@DTYPES
def test_misaligned_runs(backend, dtype, offset):
    """A slice of a flat buffer need not be aligned for vector loads: slower, the same bits."""
    expected = problem(999, dtype)
    ours = [torch.cat([t[:offset], t])[offset:] for t in expected]
    adamw_step(*expected, AdamWScalars(1, **SETTINGS[0]))
    backend.adamw(*[[t] for t in ours], [torch.tensor(1.0)], **SETTINGS[0])
    for e, a in zip(expected, ours, strict=True):
        assert_bits_equal(a, e)


def test_nan_stays_nan_in_bf16(backend):
    """Rounded like a number, this NaN would overflow to -0."""
    param, grad, m, v = problem(64, torch.bfloat16)
    m.view(torch.int32)[5::7] = 0x7FFFFFFF
    expected, ours = [[t.clone() for t in (param, grad, m, v)] for _ in range(2)]
    adamw_step(*expected, AdamWScalars(1, **SETTINGS[0]))
    backend.adamw(*[[t] for t in ours], [torch.tensor(1.0)], **SETTINGS[0])
    assert ours[0].isnan().nonzero().flatten().tolist() == list(range(5, 64, 7))
    for e, a in zip(expected, ours, strict=True):
        assert_bits_equal(a, e)


def fused_reference(param, grad, m, v, step: int, settings: dict) -> None:
    """torch's CUDA kernel (ATen fused_adam_utils.cuh, float32) operation by operation, for the order
    `fused`."""
    f32 = {name: ref.round32(value) for name, value in settings.items()}
    t = torch.tensor
    power = [t(f32[b]).pow(t(float(step))) for b in ("beta1", "beta2")]
    theta, g = param.float(), grad.float()
    if settings["weight_decay"] != 0:
        theta = ref.fma(-(t(f32["lr"]) * t(f32["weight_decay"])).item(), theta, theta)
    m.copy_(ref.fma(f32["beta1"], m, ref.fma(-f32["beta1"], g, g)))
    v.copy_(ref.fma(f32["beta2"], v, ref.fma(-f32["beta2"], g * g, g * g)))
    step_size, correction = t(f32["lr"]) / (1 - power[0]), ref.ieee_sqrt(1 - power[1])
    param.copy_(theta - step_size * m / (ref.ieee_sqrt(v) / correction + f32["eps"]))


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "beta1=.5", "no memory"])
def test_native_fused_order(backend, settings):
    expected = problem(4099, torch.float32)
    ours = [t.clone() for t in expected]
    for step in (1, 2, 3):
        fused_reference(*expected, step, settings)
        backend.adamw(*[[t] for t in ours], [torch.tensor(float(step))], **settings, fused=True)
        for name, e, a in zip(["param", "grad", "m", "v"], expected, ours, strict=True):
            assert_bits_equal(a, e, f"{name}, step {step}")


def test_refused(backend):
    """In place, so nothing may be copied or converted."""
    t, step = torch.zeros(8), [torch.tensor(1.0)]
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        backend.adamw([t.half()], [t.half()], [t], [t], step, **SETTINGS[0])
    with pytest.raises(TypeError, match="float32"):
        backend.adamw([t], [t], [t.double()], [t], step, **SETTINGS[0])
    with pytest.raises(ValueError, match="contiguous"):
        backend.adamw([t], [t], [torch.zeros(16)[::2]], [t], step, **SETTINGS[0])
    with pytest.raises(ValueError, match="8 are needed"):
        backend.adamw([t], [t], [torch.zeros(7)], [t], step, **SETTINGS[0])


# --- the operations
# --------------------------------------------------------------------------------------------------


@DTYPES
def test_ops_equal_the_reference(dtype):
    """torch.ops.qlora_ref.adamw_ and adamw_8bit_, whichever backend serves them here."""
    param, grad, m, v = problem(4099, dtype)
    states = encode_moments(m, v)
    for op, fields, reference in (
        (torch.ops.qlora_ref.adamw_, (m, v), optim_ops._adamw),
        (torch.ops.qlora_ref.adamw_8bit_, states, optim_ops._adamw_8bit),
    ):
        ours, theirs = ([[t.clone()] for t in (param, grad, *fields)] for _ in range(2))
        op(*ours, [torch.tensor(4.0)], **SETTINGS[0])
        reference(*theirs, [torch.tensor(4.0)], **SETTINGS[0])
        for (a,), (e,) in zip(ours, theirs, strict=True):
            assert_bits_equal(a, e)


# --- on a card
# -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(native.cuda is None, reason=f"no CUDA kernels: {native.missing['cuda']}")
class TestGpu:
    @DTYPES
    def test_equals_the_reference(self, dtype):
        expected = problem(1_000_003, dtype)
        ours = [t.cuda() for t in expected]
        for step in (1, 2, 1000):
            adamw_step(*expected, AdamWScalars(step, **SETTINGS[0]))
            native.cuda.adamw(*[[t] for t in ours], [torch.tensor(float(step)).cuda()], **SETTINGS[0])
            for e, a in zip(expected, ours, strict=True):
                assert_bits_equal(a, e, f"step {step}")

    @DTYPES
    def test_8bit_equals_the_reference(self, dtype):
        param, grad, m, v = problem(1_000_003, dtype)
        states = encode_moments(m, v)
        ours = [t.cuda() for t in (param, grad, *states)]
        for step in (1, 2, 3):
            adamw_step_8bit(param, grad, states, AdamWScalars(step, **SETTINGS[0]))
            native.cuda.adamw_8bit(*[[t] for t in ours], [torch.tensor(float(step)).cuda()], **SETTINGS[0])
            for e, a in zip((param, grad, *states), ours, strict=True):
                assert_bits_equal(a, e, f"step {step}")

    def test_equals_torch_fused(self):
        """Where torch has the combination (float32 all through), our kernel in order `fused` gives its
        bits."""
        param, grad, m, v = (t.cuda() for t in problem(1_000_003, torch.float32))
        ours, theirs = ([[t.clone()] for t in (param, grad, m, v)] for _ in range(2))
        for step in (1.0, 2.0, 500.0):
            count = [torch.tensor(step).cuda()]
            native.cuda.adamw(*ours, count, **SETTINGS[0], fused=True)
            torch._fused_adamw_(*theirs, [], count, **SETTINGS[0], amsgrad=False, maximize=False)
            for (a,), (e,) in zip(ours, theirs, strict=True):
                assert_bits_equal(a, e, f"step {step}")

    def test_graph_capture_and_stream(self):
        """Captured once, replayed with a step counter on the device that goes on counting."""
        ours = [t.cuda() for t in problem(100_003, torch.bfloat16)]
        expected = [t.cpu() for t in ours]
        step = torch.zeros((), device="cuda")
        warm_up = [[t.clone()] for t in ours]  # loads the kernel, which a capture must not
        native.cuda.adamw(*warm_up, [torch.ones((), device="cuda")], **SETTINGS[0])
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            step += 1
            native.cuda.adamw(*[[t] for t in ours], [step], **SETTINGS[0])
        for count in (1, 2, 3):
            graph.replay()
            adamw_step(*expected, AdamWScalars(count, **SETTINGS[0]))
        for e, a in zip(expected, ours, strict=True):
            assert_bits_equal(a, e)
