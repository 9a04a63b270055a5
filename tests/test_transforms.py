"""A fused step under JAX's transformations: whole, or refused with a sentence."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import QUICK_COMPILE, filled_cache, random_model, random_tokens, small_config
from flax import nnx

from ffjax.decode import fused_step
from pallas_kernels.compile import why_no_compiler

pytestmark = [
    pytest.mark.once(
        "A sample of JAX's transformations shows that a step is asked for its rules.",
        sample=[
            "test_a_derivative_is_refused_with_a_sentence",
            "test_no_kernel_is_launched_on_arrays_with_an_axis_of_instances",
            "test_remat_pmap_and_shard_map_run_the_step",
        ],
    ),
    pytest.mark.filterwarnings("error"),
]

CONFIG = small_config(num_layers=1, model_dim=64, ffw_dim=64)
needs_compiler = pytest.mark.skipif(
    why_no_compiler() is not None, reason=why_no_compiler() or "it is there"
)


@functools.cache
def split(seed=0):
    return nnx.split(random_model(CONFIG, seed))


@functools.cache
def step_of():
    graph, _ = split()

    def step(params, cache, tokens):
        return fused_step(nnx.merge(graph, params), cache, tokens, interpret=True)

    return step


@functools.cache
def alone():
    return jax.jit(step_of(), compiler_options=QUICK_COMPILE)


def instances(count):
    """Caches and tokens, each another's."""
    return [(filled_cache(CONFIG, [i + 1], 8), random_tokens(CONFIG, 1, i)) for i in range(count)]


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_same(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def assert_same_but_exchange(got, want):
    """The exchange has activations that were handed over, whose last bits need not be the same."""
    assert_same(_without_exchange(got), _without_exchange(want))


def _without_exchange(out):
    return out._replace(cache=dataclasses.replace(out.cache, counters=jnp.zeros((0,), jnp.int32)))


def check(mapped, args, want, compare=assert_same):
    got = jax.jit(mapped, compiler_options=QUICK_COMPILE)(*args)
    compare(got, stacked(want))


@pytest.mark.parametrize("weights", ["shared", "own"])
def test_vmap_is_a_loop(weights):
    some = instances(3)
    caches, tokens = stacked([c for c, _ in some]), stacked([t for _, t in some])
    params = [split(i if weights == "own" else 0)[1] for i in range(3)]
    want = [alone()(p, *each) for p, each in zip(params, some, strict=True)]
    if weights == "own":
        check(jax.vmap(step_of()), (stacked(params), caches, tokens), want)
    else:
        check(jax.vmap(step_of(), (None, 0, 0)), (params[0], caches, tokens), want)


def test_nested_vmap_is_a_nested_loop():
    """Each cache with each token, and caches along another axis than the first."""
    some, (_, params) = instances(2), split()
    caches = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *(c for c, _ in some))
    tokens = stacked([t for _, t in some])
    inner = jax.vmap(step_of(), (None, None, 0))
    want = [stacked([alone()(params, c, t) for _, t in some]) for c, _ in some]
    # Of two loops XLA makes another program than of one: some CPUs multiply and add at once
    # elsewhere then.
    args = params, caches, tokens
    check(jax.vmap(inner, (None, 1, None)), args, want, assert_same_but_exchange)


def launches(jaxpr):
    """Every kernel call of a jaxpr, inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from launches(inner)


def test_no_kernel_is_launched_on_arrays_with_an_axis_of_instances():
    """Interpreted, Pallas's own vmap is right; on a GPU all instances would read the first's."""
    some, (_, params) = instances(2), split()
    caches, tokens = stacked([c for c, _ in some]), stacked([t for _, t in some])
    mapped = jax.vmap(step_of(), (None, 0, 0))

    def shapes(function, *args):
        [launch] = launches(jax.make_jaxpr(function)(*args).jaxpr)
        return [getattr(v.aval, "shape", None) for v in launch.invars]

    want = shapes(step_of(), params, *some[0])
    assert shapes(mapped, params, caches, tokens) == want


def derivatives(step, params, cache, tokens):
    def loss(params):
        return step(params, cache, tokens).logits.sum()

    yield lambda: jax.grad(loss)(params)
    yield lambda: jax.vjp(loss, params)
    yield lambda: jax.jvp(loss, (params,), (params,))
    yield lambda: jax.linearize(loss, params)
    yield lambda: jax.grad(jax.checkpoint(loss))(params)
    yield lambda: jax.grad(jax.jit(loss))(params)
    yield lambda: jax.vmap(jax.grad(loss))(stacked([params] * 2))
    yield lambda: jax.grad(lambda p: jax.vmap(loss)(p).sum())(stacked([params] * 2))


def test_a_derivative_is_refused_with_a_sentence():
    [(cache, tokens)], (_, params) = instances(1), split()
    for ask in derivatives(step_of(), params, cache, tokens):
        with pytest.raises(NotImplementedError, match="A fused decode step has no derivative"):
            ask()


def test_a_step_beside_what_is_differentiated_is_no_derivative():
    [(cache, tokens)], (_, params) = instances(1), split()

    def loss(x):
        return x * jax.lax.stop_gradient(step_of()(params, cache, tokens).logits[0, 0])

    slope = jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)(2.0)
    assert slope == alone()(params, cache, tokens).logits[0, 0]


def test_remat_pmap_and_shard_map_run_the_step():
    [(cache, tokens)], (_, params) = instances(1), split()
    want = alone()(params, cache, tokens)
    step, every = step_of(), jax.sharding.PartitionSpec()
    assert_same(
        jax.jit(jax.checkpoint(step), compiler_options=QUICK_COMPILE)(params, cache, tokens), want
    )
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": every, "out_specs": every}
    mapped = jax.shard_map(step, check_vma=False, **specs)
    got = jax.jit(mapped, compiler_options=QUICK_COMPILE)(params, cache, tokens)
    assert_same(got, want)
    with pytest.raises(ValueError, match=r"Call jax\.shard_map with check_vma=False"):
        jax.shard_map(step, **specs)(params, cache, tokens)
    one = stacked([(cache, tokens)])
    got = jax.jit(jax.pmap(step, in_axes=(None, 0, 0)), compiler_options=QUICK_COMPILE)(
        params, *one
    )
    assert_same(got, stacked([want]))


# Explicit axes need more than one device, which a process must ask for before it starts.
_SHARDED = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
import jax
import test_transforms as cases
[(cache, tokens)], (_, params) = cases.instances(1), cases.split()
spec = jax.sharding.PartitionSpec(None, None, None, "x")
step = cases.alone()
for axes in ("Explicit", "Auto"):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType[axes],))
    keys = jax.device_put(cache.k, jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        try:
            got = step(params, replace(cache, k=keys), tokens)
        except NotImplementedError as error:
            print(axes, error)
        else:
            cases.assert_same(got, step(params, cache, tokens))
            print(axes, "the same")
"""


def test_sharded_inputs_run_or_are_refused(monkeypatch, request):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2", prepend=" ")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    program = _SHARDED.format(tests=str(request.path.parent))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Explicit A fused decode step runs on one device")
    assert done.stdout.endswith("\nAuto the same\n")


# The step as ffjax launches it, compiled for a GPU: XLA's plugin wants a process of its own.
_COMPILED = """
import functools, re, sys
from ffjax.config import preset
from ffjax.dims import step_dims
from ffjax.transforms import launch_whole
from pallas_kernels import compile_worker as worker
from pallas_kernels.stream.planner import make_stream_plan
from pallas_kernels.targets import target

gpu, dims = target("h200"), step_dims(preset("python-bytes-3m"), 2, 512)
bare = worker.stream_step
worker.stream_step = lambda plan, *step, **how: launch_whole(
    functools.partial(bare, plan, **how), *step
)
compiled = worker.compile_step(make_stream_plan(dims, gpu.gpu), gpu.config)
[entry] = re.findall(r"^ENTRY [^\\n]*\\{\\n(.*?)^\\}", compiled.as_text(), re.M | re.S)
kinds = re.findall(r"^\\s+(?:ROOT )?\\S+ = (?:\\(.*?\\)|\\S+) ([\\w-]+)\\(", entry, re.M)
idle = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
assert [kind for kind in kinds if kind not in idle] == ["custom-call"], kinds
memory = compiled.memory_analysis()
assert memory.alias_size_in_bytes >= dims.cache_bytes([512, 512])
assert memory.temp_size_in_bytes < 2**20
print("one kernel")
"""


@needs_compiler
def test_what_takes_transformations_adds_nothing_to_a_compiled_step(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "one kernel\n"
