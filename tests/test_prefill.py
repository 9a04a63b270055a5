"""The packed prefill against the reference's: every family and format, chunks, ragged prompts.

Its kernels are interpreted here; `test_gpu_prefill.py` runs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close
from prefill_cases import CONFIGS, check, fed, model_of, prompts_of

from ffjax.decode import default_device
from ffjax.generation import generate
from ffjax.prefill import choice, packed, packing, products
from ffjax.prefill.choice import resolve_prefill
from ffjax.prefill.packed import PackedPrefill
from ffjax.prefill.packing import chunks_of, sizes_of
from ffjax.prefill.padded import PaddedPrefill
from pallas_kernels.gpu import Gpu
from pallas_kernels.prefill import product
from pallas_kernels.prefill.attention import blocks_for, cut, tiles_for
from pallas_kernels.prefill.product import tiling_for

pytestmark = [
    pytest.mark.once(
        "A sample of shapes shows what a JAX makes of the interpreted kernel.",
        sample=[
            "test_it_leaves_the_references_keys_and_values[gemma3]",
            "test_chunks_hold_every_token_once",
            "test_who_asks_for_a_prefill_gets_it_or_a_sentence",
            "test_generate_says_which_prefill_ran",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

# Windows of the small configurations are shorter than the longest prompt.
LENGTHS = (45, 1, 20)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that end within prompts."""
    monkeypatch.setattr(packing, "LARGEST", 32)
    monkeypatch.setattr(packing, "SMALLEST", 16)


@pytest.mark.drawn(
    "What the others have, one of these has as well.",
    sample=[
        "test_it_leaves_the_references_keys_and_values[one query head a key head]",
        "test_it_leaves_the_references_keys_and_values[heads of 24]",
        "test_it_leaves_the_references_keys_and_values[olmo3]",
        "test_it_leaves_the_references_keys_and_values[gemma2]",
        "test_it_leaves_the_references_keys_and_values[gemma3]",
        "test_it_leaves_the_references_keys_and_values[phi3]",
        "test_it_leaves_the_references_keys_and_values[granite_code]",
        "test_it_leaves_the_references_keys_and_values[smollm3]",
        "test_it_leaves_the_references_keys_and_values[mixed]",
        "test_it_leaves_the_references_keys_and_values[of files]",
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("small_chunks")
def test_it_leaves_the_references_keys_and_values(name):
    got, want = check(name, "float32", LENGTHS, 64)
    assert got.token == want.token


@pytest.mark.parametrize("name", ["llama", "gemma2", "int8", "int4", "mixed", "small groups"])
def test_it_rounds_as_the_reference_does(name):
    check(name, "bfloat16", LENGTHS, 64)


@pytest.mark.drawn(
    "Mixed weights have matrices of int8.",
    sample=[
        "test_weights_of_many_tokens_are_multiplied_out[int4]",
        "test_weights_of_many_tokens_are_multiplied_out[mixed]",
        "test_weights_of_many_tokens_are_multiplied_out[int8 and a bias]",
    ],
)
@pytest.mark.parametrize("name", ["int8", "int4", "mixed", "small groups", "int8 and a bias"])
def test_weights_of_many_tokens_are_multiplied_out(name, monkeypatch):
    """Integers are read by a kernel of few tokens; of many, by the library's product."""
    model, lengths = model_of(name, "bfloat16"), (17, 3)
    prompts = prompts_of(model.config, lengths)
    few = fed(PackedPrefill, model, prompts, 32)
    monkeypatch.setattr(products, "MAX_TOKENS", {4: 0, 8: 0})
    monkeypatch.setattr(products, "multiply", None)  # it must not be called
    packed._programs.cache_clear()  # programs know nothing of what was patched
    many = fed(PackedPrefill, model, prompts, 32)
    packed._programs.cache_clear()
    for kept in ("k", "v"):
        assert_close(few.live(kept), many.live(kept), "packed_vs_padded_bfloat16")


def test_prompts_that_are_drawn_from_get_the_references_tokens():
    model, lengths = model_of("llama", "float32"), (5, 12, 3)
    prompts = prompts_of(model.config, lengths)
    for seed in (7, (1, 2, 3)):
        how = {"temperature": 1.0, "seed": seed}
        got, want = (
            fed(kind, model, prompts, 32, **how) for kind in (PackedPrefill, PaddedPrefill)
        )
        assert got.token == want.token


def test_two_runs_are_bit_equal():
    model = model_of("llama", "bfloat16")
    prompts = prompts_of(model.config, LENGTHS)
    first, second = (fed(PackedPrefill, model, prompts, 64) for _ in range(2))
    for kept in ("k", "v"):
        assert first.live(kept).tobytes() == second.live(kept).tobytes()


def test_a_prompts_numbers_do_not_depend_on_the_others():
    model = model_of("gemma2", "float32")
    together = prompts_of(model.config, (30, 9, 30))
    all_of_them = fed(PackedPrefill, model, together, 64)
    alone = fed(PackedPrefill, model, together[1:2], 64)
    begin = len(together[0])
    for kept in ("k", "v"):
        mine = all_of_them.live(kept)[:, begin : begin + len(together[1])]
        assert_close(mine, alone.live(kept), "packed_vs_padded_float32")


def test_chunks_hold_every_token_once():
    rng = np.random.default_rng(0)
    for lengths in [(1,), (32,), (33,), (2048,), (2049, 1), (5000, 3, 1, 900), (1,) * 40]:
        prompts = [rng.integers(0, 99, n).astype(np.int32) for n in lengths]
        capacity = max(lengths) + 7
        chunks = chunks_of(prompts, capacity, lambda size: min(64, size))
        fed_so_far = [[] for _ in lengths]
        ends = np.zeros(len(lengths), int)
        for chunk in chunks:
            _, rows, positions = chunk.fed
            counts, last = chunk.rows
            real = int(counts.sum())
            assert (positions[real:] >= capacity).all()
            assert len(set(positions[real:])) == chunk.size - real
            for token, row, position in zip(*chunk.fed[:, :real], strict=True):
                assert position == len(fed_so_far[row])
                fed_so_far[row].append(token)
            for row in np.flatnonzero(last < chunk.size):
                ends[row] += 1
                assert (rows[last[row]], positions[last[row]]) == (row, lengths[row] - 1)
            covered = np.zeros(chunk.size, int)
            for start, count, row, position in chunk.tiles:
                covered[start : start + count] += 1
                assert (rows[start : start + count] == row).all()
                assert (positions[start : start + count] == position + np.arange(count)).all()
            assert (covered[:real] == 1).all()
            assert not covered[real:].any()
        assert [list(prompt) for prompt in prompts] == fed_so_far
        assert (ends == 1).all()


def test_sizes_are_few_and_waste_less_than_half():
    sizes = {total: sizes_of(total) for total in range(1, 6000)}
    assert len({size for each in sizes.values() for size in each}) == 7
    for total, each in sizes.items():
        assert sum(each) >= total
        *full, last = each
        assert sum(full) + last / 2 < total or last == packing.SMALLEST


def test_tiles_with_the_most_keys_come_first():
    tiles = cut([(0, 100, 0), (2, 10, 500)], 32, tiles_for(128, 3, 32))
    assert len(tiles) == 7
    assert tiles[:, 3].tolist() == [500, 96, 64, 32, 0, 0, 0]
    assert tiles[:, 1].tolist() == [10, 4, 32, 32, 32, 0, 0]


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "12.0"])
def test_work_fits_the_gpu(capability):
    gpu = Gpu.named("made up", capability, 100)
    for head_dim in (16, 64, 80, 128, 256):
        for itemsize in (2, 4):
            blocks = blocks_for(head_dim, itemsize, gpu.shared_memory, 1000)
            width = 1 << (head_dim - 1).bit_length()
            held = blocks.queries + 2 * blocks.num_stages * blocks.keys
            assert held * width * itemsize <= gpu.shared_memory
            assert blocks_for(head_dim, itemsize, gpu.shared_memory, 5).queries == 16
    for bits in (4, 8):
        for tokens in (1, 16, 33, 128):
            for rows in (100, 2048, 28_672):
                tiling = tiling_for(rows, tokens, bits, gpu)
                matrix = tiling.rows * (1 if bits == 8 else 4)
                fed = tiling.tokens * (2 if bits == 8 else 16)
                held = tiling.num_stages * tiling.depth * (matrix + fed)
                assert held <= gpu.shared_memory


def test_who_asks_for_a_prefill_gets_it_or_a_sentence():
    device = default_device()
    assert resolve_prefill("bfloat16", device, None, None) == "xla"
    assert resolve_prefill("bfloat16", device, None, "xla") == "xla"
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU.*Use prefill='xla'"):
        resolve_prefill("bfloat16", device, None, "pallas")
    with pytest.raises(ValueError, match="prefill is one of 'pallas', 'steps', 'xla' or None"):
        generate(model_of("llama", "float32"), [1], 1, prefill="fast")  # pyright: ignore


def test_a_gpu_gets_the_packed_one_unless_the_reference_is_asked_for(monkeypatch):
    monkeypatch.setattr(choice.Gpu, "of", lambda device: Gpu.named("made up", "9.0", 132))
    device = default_device()
    assert resolve_prefill("bfloat16", device, None, None) == "pallas"
    assert resolve_prefill("bfloat16", device, "pallas", None) == "pallas"
    assert resolve_prefill("bfloat16", device, "xla", None) == "xla"
    assert resolve_prefill("bfloat16", device, "xla", "pallas") == "pallas"


def test_generate_says_which_prefill_ran():
    out = generate(model_of("llama", "float32"), [1, 2], 2)
    assert out.prefill == "xla"


def test_the_kernel_is_not_given_what_it_cannot_reach():
    def can_read(shape, dtype):
        return product.can_read(jax.ShapeDtypeStruct(shape, dtype))

    assert can_read((32, 14_336, 4_096), jnp.int8)
    assert not can_read((32, 28_672, 4_096), jnp.int8)  # gate_up of Llama 3.1 8B
    assert can_read((40, 28_672, 4_096), jnp.int8)  # counted in 64 bits
    assert can_read((32, 28_672, 512), jnp.int32)
    assert can_read((80, 57_344, 1_024), jnp.int32)
