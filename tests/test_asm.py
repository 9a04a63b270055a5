"""The assembler of inline PTX: what it writes runs, and what PTX does not have it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest
from ptx_inline import inline
from ptx_machine import Machine
from ptx_mutations import mutated, occurs
from ptx_text import parse

from pallas_kernels.asm import LANE, TID, AsmError, Block, bits_of
from pallas_kernels.inline_ptx.operation import listings
from pallas_kernels.stream import ptx


def run(b: Block, *operands, threads: int = 32) -> list[np.ndarray]:
    return Machine(threads, 256, 64).run(b.text(), b.constraints, operands)


def counting() -> Block:
    """Adds 3 as often as a thread's lane says."""
    b = Block()
    [total] = b.results("u32")
    left, none = b.u32("left"), b.pred("none")
    done = b.label("done")
    b.comment("Nothing so far.")
    b.mov(total, 0)
    b.mov(left, LANE)
    again = b.marked("again")
    b.setp("eq", none, left, 0)
    b.bra_if(none, done)
    b.add(total, total, 3)
    b.sub(left, left, 1)
    b.bra(again)
    b.mark(done)
    return b


def test_a_loop_runs_as_it_is_written():
    [total] = run(counting())
    assert total.tolist() == [3 * lane for lane in range(32)]


def test_an_instruction_has_a_line_and_only_people_read_comments():
    b = counting()
    text = b.text()
    assert text.split("\n") == [
        "{",
        "    .reg .pred %none;",
        "    .reg .b32 %left;",
        "    mov.b32 $0, 0;",
        "    mov.u32 %left, %laneid;",
        "again:",
        "    setp.eq.u32 %none, %left, 0;",
        "    @%none bra done;",
        "    add.u32 $0, $0, 3;",
        "    sub.u32 %left, %left, 1;",
        "    bra again;",
        "done:",
        "}",
    ]
    listing = b.listing()
    assert "    // Nothing so far." in listing
    assert listing.startswith("// $0: result, u32\n")
    assert parse(listing, b.constraints).instructions == parse(text, b.constraints).instructions


def test_what_is_said_of_a_text_does_not_change_it():
    b, other = counting(), counting()
    other.comment("bra, and what else a compiler might take for code; {")
    assert b.text() == other.text()
    assert b.jumps
    b = Block()
    b.comment("bra away")
    assert not b.jumps


def test_names_are_each_their_own():
    b = Block()
    names = [b.u32("part").name, b.f32("part").name, b.u32("part").name]
    assert names == ["%part", "%part_2", "%part_3"]
    assert b.label("part").name == "part_4"


def test_registers_that_nobody_uses_are_not_declared():
    b = Block()
    b.mov(b.u32("used"), 1)
    b.f32("unused")
    assert "unused" not in b.text()


def test_bindings_follow_from_what_is_declared():
    b = Block()
    b.results("f32", "u32")
    b.operands(place="u64", count="s32", scale="f32")
    assert b.constraints == "=&f,=&r,l,r,f"
    b = Block()
    b.results("f32", early=False)
    assert b.constraints == "=f"


def test_halves_vectors_and_guards():
    b = Block()
    low, high = b.results("u32", "u32")
    [address] = b.operands(address="s32")
    thread, pair, is_first = b.u32("thread"), b.u64("pair"), b.pred("is_first")
    words = b.u32s(*["word"] * 4)
    b.mov(thread, TID)
    b.setp("eq", is_first, thread, 0)
    with b.when(is_first):
        b.st_shared(address + 16, [1, 2, 3, 4])
    b.bar_program()
    b.ld_shared(words, address + 16)
    b.pack(pair, words[2], words[3])
    b.unpack(low, high, pair)
    with b.unless(is_first):
        b.mov(low, bits_of(1.0))
    got = run(b, Machine.shared_base, threads=64)
    assert got[0].tolist() == [3] + [0x3F800000] * 63
    assert got[1].tolist() == [4] * 64


def test_a_type_may_be_taken_for_another_of_its_size():
    b = Block()
    [out] = b.results("u32")
    [x] = b.operands(x="s32")
    less = b.pred("less")
    b.setp("lt", less, x.as_("u32"), 5)
    b.selp(out, 1, 0, less)
    assert run(b, -1)[0].tolist() == [0] * 32


def bad(write) -> str:
    b = Block()
    registers = {"u": b.u32("u"), "f": b.f32("f"), "p": b.pred("p"), "w": b.u64("w")}
    with pytest.raises(AsmError) as error:
        write(b, **registers)
        b.text()
    return str(error.value)


REFUSED = {
    "a float as a whole number": lambda b, u, f, p, w: b.add(u, u, f),
    "a whole number as a float": lambda b, u, f, p, w: b.mul(f, u, f),
    "a predicate as a number": lambda b, u, f, p, w: b.add(u, u, p),
    "a number as a predicate": lambda b, u, f, p, w: b.bra_if(u, b.label("here")),
    "bits of another size": lambda b, u, f, p, w: b.xor(u, u, w),
    "a predicate as bits": lambda b, u, f, p, w: b.shl(u, p, 1),
    "a move to another size": lambda b, u, f, p, w: b.mov(u, w),
    "another size": lambda b, u, f, p, w: b.add(w, w, u),
    "a product that is not twice as long": lambda b, u, f, p, w: b.mul_wide(u, u, 2),
    "a number that does not fit": lambda b, u, f, p, w: b.add(u, u, 1 << 32),
    "a fraction as a whole number": lambda b, u, f, p, w: b.add(u, u, 0.5),
    "an address in global memory of 32 bits": lambda b, u, f, p, w: b.ld_relaxed(u, u),
    "an address in shared memory of 64 bits": lambda b, u, f, p, w: b.ld_shared(u, w),
    "three words at once": lambda b, u, f, p, w: b.ld_shared([u, u, u], u),
    "32 bytes at once": lambda b, u, f, p, w: b.ld_shared([w] * 4, u),
    "a product of too few registers": lambda b, u, f, p, w: b.mma_s8(
        [u] * 4, [u], [u] * 2, [u] * 4
    ),
    "a special register as an operand": lambda b, u, f, p, w: b.add(u, TID, 1),
    "two guards": lambda b, u, f, p, w: b.when(p).__enter__() or b.bra_if(p, b.label("here")),
    "a label that stands nowhere": lambda b, u, f, p, w: b.bra(b.label("here")),
    "a label in two places": lambda b, u, f, p, w: [b.mark(x) for x in [b.label("here")] * 2],
    "a name that compilers take": lambda b, u, f, p, w: b.u32("r1"),
    "a name of PTX's own": lambda b, u, f, p, w: b.u32("laneid"),
    "a name that PTX does not take": lambda b, u, f, p, w: b.u32("%x"),
    "results after operands": lambda b, u, f, p, w: (b.operands(x="u32"), b.results("u32")),
    "a comment that compilers read": lambda b, u, f, p, w: b.comment("of $1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ptx_does_not_have_is_refused(name):
    assert bad(REFUSED[name])[-1] in ".:s"


def test_what_is_lowered_may_be_listed():
    with listings() as texts:
        made = inline(lambda: ptx.wait_copies(jnp.int32(0), jnp.int32(0), 8, True))
    [listing] = texts
    assert listing.startswith("// ffjax_wait_copies\n// $0: result, u32\n// $1: barrier, s32\n")
    assert "    // Each thread has looked by itself: a warp votes, and goes on as one." in listing
    parsed = (parse(x, made.constraints).instructions for x in (listing, made.text))
    assert next(parsed) == next(parsed)
    assert "//" not in made.text
    inline(lambda: ptx.read_row(jnp.int32(0)))
    assert len(texts) == 1


# Mutations

TEXT = """{
    .reg .b32 %left, %left_2; .reg .pred %none;
    mov.b32 %left, 4;
again:
    setp.eq.u32 %none, %left, 0; // the end
    @%none bra done;
    ld.shared.v2.b32 {%left, %left_2}, [$1+16];
    @!%none add.u32 %left_2, %left, 0xff;
    bra again;
done:
}"""


@pytest.mark.parametrize(
    ("pattern", "change", "made"),
    [
        ("mov.b32 left, 4", "mov.b32 left, 5", "mov.b32 %left, 5;"),
        ("setp.eq.u32 none, left", "setp.ne.u32 none, left", "setp.ne.u32 %none, %left, 0;"),
        ("@none bra done", "bra done", "bra done;"),
        ("bra done", "bra again", "@%none bra again;"),
        (
            "ld.shared.v2.b32 {left_1, left_2}, [$1+*]",
            "ld.shared.v2.b32 {left_2, left_1}, [$1+*]",
            "ld.shared.v2.b32 {%left_2, %left}, [$1+16];",
        ),
        ("add.u32 left, left, *", "sub.u32 left, left, *", "@!%none sub.u32 %left_2, %left, 0xff;"),
        ("add.u32 left, left, 0xff", "bar.sync 0; trap", "@!%none bar.sync 0; @!%none trap;"),
    ],
)
def test_a_mutation_changes_the_instruction_that_it_names(pattern, change, made):
    text = mutated(TEXT, (pattern, change))
    assert made in text
    before, after = (parse(x, "=r,r").instructions for x in (TEXT, text))
    assert len(after) >= len(before)
    assert sum(a.text == b.text for a, b in zip(before, after, strict=False)) >= 4


def test_a_mutation_of_nothing_fails():
    assert occurs(TEXT, ("mov.b32 left, 4", ""))
    assert not occurs(TEXT, ("mov.b32 left, 3", ""))
    with pytest.raises(LookupError, match="does not occur"):
        mutated(TEXT, ("mov.b32 left, 3", ""))
    with pytest.raises(LookupError, match="does not occur"):
        mutated(TEXT, ("mov.b32 left, 4", "mov.b32 left, right"))
