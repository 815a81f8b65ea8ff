"""Input codes: distribution, seeds, pieces over time, memory, errors."""

import pytest
import torch
from scipy.stats import binom, chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from lasnn_sj.data import encoding
from lasnn_sj.data.encoding import DirectEncoder, PoissonEncoder

SIGNIFICANCE = 1e-6  # the chance that a correct encoder fails a test, at another seed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("x", [-1.0, -0.7, -0.25, -0.01, 0.01, 0.3, 0.9, 1.0])
def test_poisson_mean_over_time_is_binomial_with_the_pixels_sign(x):
    T, pixels = 200, 500
    spikes = PoissonEncoder(T, generator())(torch.full((1, pixels), x))
    count = int(spikes.sum().item() / (1 if x > 0 else -1))
    low, high = binom.interval(1 - SIGNIFICANCE, T * pixels, abs(x))
    assert low <= count <= high


def test_poisson_counts_of_single_pixels_follow_the_binomial_distribution():
    """Correlated steps or pixels would keep the mean and change the shape."""
    T, p, pixels = 8, 0.4, 20000
    counts = PoissonEncoder(T, generator(1))(torch.full((pixels,), p)).sum(0).long()
    observed = torch.bincount(counts, minlength=T + 1).numpy()
    expected = binom.pmf(range(T + 1), T, p) * pixels
    assert chisquare(observed, expected).pvalue > SIGNIFICANCE


def test_poisson_spikes_are_only_zero_and_the_pixels_sign():
    images = torch.linspace(-1, 1, 41)
    spikes = PoissonEncoder(50, generator())(images)
    assert spikes.shape == (50, 41)
    assert ((spikes == 0) | (spikes == images.sign())).all()


def test_a_pixel_of_zero_never_fires_and_one_of_magnitude_one_always_does():
    spikes = PoissonEncoder(1000, generator())(torch.tensor([[0.0, -0.0, 1.0, -1.0]]))
    assert spikes.sum((0, 1)).tolist() == [0, 0, 1000, -1000]


class ZeroDraws(PoissonEncoder):
    """The rarest draw, u = 0, of every pixel."""

    def steps(self, images, steps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda size, **options: torch.zeros(size))
            return super().steps(images, steps)


def test_a_pixel_of_zero_does_not_fire_even_where_u_is_zero():
    assert ZeroDraws(1)(torch.tensor([[0.0, 0.1, -0.1]])).tolist() == [[[0, 1, -1]]]


def test_poisson_is_reproducible_by_its_generator_alone():
    images = torch.linspace(-1, 1, 60).reshape(2, 30)
    first = PoissonEncoder(10, generator(3))(images)
    torch.manual_seed(99)
    assert torch.equal(first, PoissonEncoder(10, generator(3))(images))
    assert not torch.equal(first, PoissonEncoder(10, generator(4))(images))


def test_poisson_without_generator_follows_the_global_seed():
    images, codes = torch.full((100,), 0.5), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        codes.append(PoissonEncoder(10)(images))
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [11, 1]])
def test_poisson_in_pieces_equals_one_call(pieces):
    images = torch.linspace(-1, 1, 3 * 5).reshape(3, 5)
    whole = PoissonEncoder(12, generator(7))(images)
    encoder = PoissonEncoder(12, generator(7))
    assert torch.equal(torch.cat([encoder.steps(images, n) for n in pieces]), whole)


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (5,), (0, 3)])
def test_poisson_equals_its_formula_to_the_bit(shape, dtype, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 1000)  # two steps of 384 at a time, and one left
    images = torch.rand(shape, generator=generator(1)).mul(2).sub(1).to(dtype)
    u = torch.rand((7, *shape), generator=generator(2))
    expected = (u <= images.abs()).to(dtype) * images.sign()
    assert torch.equal(bits(PoissonEncoder(7, generator(2))(images)), bits(expected))


class LargestByDtype(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns, for each dtype."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements[result.dtype] = max(self.elements.get(result.dtype, 0), result.numel())
        return result


@pytest.mark.parametrize("draw", [encoding._draw_in_pieces, encoding._draw_at_once])
def test_poisson_makes_no_float32_tensor_of_the_codes_size(draw, monkeypatch):
    monkeypatch.setattr(encoding, "PIECE", 1000)
    images = torch.rand(2, 3, 8, 8, generator=generator()).to(torch.bfloat16)
    with LargestByDtype() as largest:
        draw(images, images.sign(), 50, generator())
    assert largest.elements[torch.bfloat16] == 50 * images.numel()
    assert largest.elements[torch.float32] <= 2 * images.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("x", [0.0, -(2.0**-8), 0.3, -0.7, 1.0, -1.0])
def test_poisson_drawn_at_once_as_on_cuda_is_binomial(x, dtype):
    T, images = 100, torch.full((2000,), x, dtype=dtype)
    code = encoding._draw_at_once(images.abs(), images.sign(), T, generator())
    assert (code.shape, code.dtype) == ((T, 2000), dtype)
    assert ((code == 0) | (code == images.sign())).all()
    low, high = binom.interval(1 - SIGNIFICANCE, T * 2000, images[0].abs().item())
    assert low <= code.float().abs().sum() <= high


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("encoder", [PoissonEncoder(3), DirectEncoder(3)])
def test_dtype_is_kept(encoder, dtype):
    assert encoder(torch.zeros(2, 3, dtype=dtype)).dtype == dtype


def test_half_precision_pixels_keep_small_rates():
    """A bfloat16 u would be a multiple of 1/256 and fire twice as often at 1/256."""
    T, pixels, p = 100, 2000, 2**-8
    count = PoissonEncoder(T, generator())(torch.full((pixels,), p, dtype=torch.bfloat16)).float().sum()
    low, high = binom.interval(1 - SIGNIFICANCE, T * pixels, p)
    assert low <= count <= high


@pytest.mark.parametrize("bad", [1.01, -1.01, 255.0, float("nan"), float("inf")])
def test_poisson_refuses_pixels_outside_minus_one_to_one(bad):
    images = torch.zeros(2, 3, 4, 4)
    images[1, 2, 3, 3] = bad
    with pytest.raises(ValueError, match=r"pixels in \[-1, 1\], got values"):
        PoissonEncoder(2)(images)


@pytest.mark.parametrize("kind", [PoissonEncoder, DirectEncoder])
@pytest.mark.parametrize("T", [0, -1, True, 2.0, "3", None])
def test_T_must_be_a_whole_positive_number(kind, T):
    with pytest.raises(ValueError, match="T must be a whole number"):
        kind(T)


def test_direct_is_a_view_with_time_stride_0():
    images = torch.randn(2, 3, 4, 4)
    code = DirectEncoder(7)(images)
    assert code.shape == (7, 2, 3, 4, 4)
    assert code.stride(0) == 0
    assert code.data_ptr() == images.data_ptr()
    assert torch.equal(code, images.repeat(7, 1, 1, 1, 1))


def test_direct_in_pieces_has_the_asked_length():
    assert DirectEncoder(7).steps(torch.zeros(2, 3), 4).shape == (4, 2, 3)
