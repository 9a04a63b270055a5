"""Says what a checkpoint, Hugging Face folder or GGUF file is, without reading its weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ffjax.commands.folders import add_ignore_field, is_folder, notes_on_stderr
from ffjax.commands.options import whole
from ffjax.config import ModelConfig
from ffjax.failures import without_advice

__all__ = ["HELP", "add_arguments", "inspect", "run"]

_FORMS = {"huggingface": "Hugging Face", "gguf": "GGUF"}

HELP = "say what a checkpoint is, and whether the fused kernel can run it here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ffjax inspect`."""
    parser.add_argument("path", metavar="PATH", help="checkpoint, Hugging Face folder or GGUF file")
    parser.add_argument(
        "--batch", metavar="B", type=whole(1), default=1, help="sequences; default: %(default)s"
    )
    add_ignore_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints a table, or JSON; one sentence and exit code 2 where it is damaged or unsupported."""
    from checkpoints.places import model_path

    path = model_path(args.path)
    is_folder(args, path)  # or --ignore-field is refused
    with notes_on_stderr("inspect"):
        report = inspect(path, args.batch, ignore_fields=args.ignore_field)
    if args.json:
        print(json.dumps(report))
        return 0
    for name, value in _table(report).items():
        print(f"{name:<14}{value}")
    return 0


def inspect(path: Path, batch: int = 1, *, ignore_fields: Collection[str] = ()) -> dict[str, Any]:
    """What is at `path`.

    Args:
        path: the directory of a checkpoint or of a Hugging Face model, or a GGUF file.
        batch: B, sequences that the fused kernel is asked about.
        ignore_fields: as in `ffjax.convert_hf`.

    Returns:
        JSON-able facts by name. "why_not_fused" is None where a kernel can run
        over all of the model's positions, else why the better one cannot.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is none of them, or damaged, or asks for what is not supported.
        NotImplementedError: a package that it needs is not installed.
    """
    import jax.numpy as jnp
    import numpy as np

    import checkpoints
    from checkpoints.opening import comes_in, open_incoming
    from checkpoints.skeleton import array_shapes
    from ffjax.decode import choose_kernel

    if comes_in(path):
        incoming = open_incoming(path, ignore_fields=ignore_fields)
        config, loaded_as, dtypes = incoming.config, np.dtype(jnp.bfloat16), incoming.dtypes
        kind = f"{_FORMS[incoming.form]} {incoming.architecture}"
        weight_bytes, source = incoming.nbytes, None
    else:
        manifest = checkpoints.Manifest.read(path)
        manifest.check_files(path)
        config, loaded_as = manifest.config, np.dtype(manifest.dtype)
        kind, source = "ffjax checkpoint", manifest.source
        shapes = array_shapes(config, loaded_as)
        dtypes = dict(Counter(str(leaf.dtype) for leaf in shapes.values()))
        weight_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
    files = path.rglob("*") if path.is_dir() else [path]
    return {
        "path": str(path),
        "kind": kind,
        "name": config.name,
        "family": config.family,
        "weights": config.num_params,
        "dtypes": dtypes,
        "weight_bytes": weight_bytes,
        "quantized": str(config.weights) or None,
        "disk_bytes": sum(file.stat().st_size for file in files if file.is_file()),
        "config": config.to_dict(),
        "tokenizer": _tokenizer(path, config),
        "source": source,
        "why_not_fused": choose_kernel(config, loaded_as, batch, config.max_context)[1],
    }


def _tokenizer(path: Path, config: ModelConfig) -> dict[str, Any] | str:
    """What the tokenizer is, or why there is none."""
    from ffjax.hf_tokenizer import HFTokenizer
    from ffjax.text.tokenizers import load_tokenizer

    try:
        tokenizer = load_tokenizer(path, config)
    except (ValueError, NotImplementedError) as error:
        return str(error)  # the weights are none the worse for it
    kind = "tokenizer.json" if path.is_dir() else "GGUF"
    templates = tokenizer.chat_templates if isinstance(tokenizer, HFTokenizer) else {}
    return {
        "kind": kind if isinstance(tokenizer, HFTokenizer) else "bytes",
        "vocab_size": tokenizer.vocab_size,
        "eot_ids": list(tokenizer.eot_ids),
        "beyond_the_model": max(0, tokenizer.vocab_size - config.vocab_size),
        "chat_template": bool(templates),
        "chat_templates": sorted(templates),
    }


def _table(report: dict[str, Any]) -> dict[str, str]:
    """The report for people."""
    c, tokenizer = report["config"], report["tokenizer"]
    if isinstance(tokenizer, dict):
        templates, beyond = tokenizer["chat_templates"], tokenizer["beyond_the_model"]
        if len(templates) > 1:
            template = f"chat templates {', '.join(templates)}"
        else:
            template = f"{'a' if templates else 'no'} chat template"
        unknown = f" ({beyond:,} of them unknown to the model)" if beyond else ""
        ends = ", ".join(map(str, tokenizer["eot_ids"]))
        tokenizer = (
            f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens{unknown}; a text ends with "
            f"{ends}; {template}"
        )
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(ModelConfig)
        if field.default is not dataclasses.MISSING
    }
    special = [f"{name}={c[name]!r}" for name in defaults if c[name] != defaults[name]]
    elsewhere = ("name", "family", "weights")  # on lines of their own
    shown = [entry for entry in special if entry.partition("=")[0] not in elsewhere]
    return {
        "path": report["path"],
        "kind": report["kind"],
        "model": f"{report['name']}, {report['family']}",
        "weights": f"{report['weights']:,}",
        "layers": f"{c['num_layers']} of width {c['model_dim']}, feed-forward {c['ffw_dim']}",
        "heads": f"{c['num_heads']} of {c['head_dim']}, {c['num_kv_heads']} of keys and values",
        "vocabulary": f"{c['vocab_size']:,}",
        "configuration": ", ".join(shown) or "all defaults",
        "dtypes": ", ".join(
            f"{count} arrays of {name}" for name, count in report["dtypes"].items()
        ),
        "quantized": report["quantized"] or "no",
        **({"calibrated": made} if (made := _calibrated(report["source"])) else {}),
        "bytes": f"{report['weight_bytes']:,} of weights, {report['disk_bytes']:,} on disk",
        "tokenizer": tokenizer,
        "source": _short(json.dumps(report["source"])) if report["source"] else "not said",
        "fused kernel": without_advice(report["why_not_fused"] or "can run it here"),
    }


def _calibrated(source: Any) -> str | None:
    """What weights were rounded for, where `ffjax quantize` was given texts: all it noted."""
    if not isinstance(source, dict) or not isinstance(made := source.get("calibration"), dict):
        return None
    pairs = ((name, x if isinstance(x, str) else json.dumps(x)) for name, x in made.items())
    return "; ".join(f"{name} {value}" for name, value in pairs)


def _short(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[:most]}... (--json has all of it)"
