"""What the adapter_config.json of a LoRA adapter asks for, and what of it is refused.

Read from peft 0.21 (`LoraConfig`), which takes the place of older ones and reads what they wrote.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints.hf_adapter import ADAPTER
from checkpoints.hf_fields import listed, warn
from checkpoints.hf_files import downloaded_json
from checkpoints.manifest import CheckpointError

__all__ = ["MERGE_BY_PEFT", "LoraConfig"]

MERGE_BY_PEFT = (
    "Merge the adapter by peft (merge_and_unload, save_pretrained), and convert what it writes."
)

# Fields that must be empty, and what one that is not would be.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "tokens that were trained whole",
    "target_parameters": "adapters of single parameters",
    "layer_replication": "layers that are there several times",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "arrow_config": "Arrow, which chooses among adapters",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "megatron_config": "layers of Megatron",
}

# How training began. Other ways (pissa, olora, corda, loftq, lora_ga) change the model's own
# weights, too, before anything is trained; mica is a formula of its own.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")

# Fields that say nothing of the merged weights. fan_in_fan_out is among them: peft takes it for
# false where a layer is linear, as all of ours are.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "lora_dropout", "fan_in_fan_out", "ensure_weight_tying", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"),
    "qalora_group_size",
)

_ALL_LINEAR = "all-linear"
# Where the number of a layer stands in a module's name, where layers_pattern does not say it.
_NUMBERED = r".*?\.[^.]*\.(\d+)\."


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The configuration of a LoRA adapter.

    A module is called as in the model: "model.layers.0.self_attn.q_proj".

    Attributes:
        where: the adapter's folder, for messages.
        rank: r of modules that `rank_pattern` does not name.
        alpha: lora_alpha of modules that `alpha_pattern` does not name.
        rslora: whether alpha is divided by sqrt(r) in place of r.
        rank_pattern: r by patterns of modules' names, the first that fits.
        alpha_pattern: lora_alpha by such patterns.
        targets: names of modules or their ends; or one regular expression, or "all-linear".
        excluded: modules that have none, in the same forms.
        layers: the only layers with adapters; None, all.
        layers_pattern: what stands before the number of a layer.
    """

    where: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: list[str] | str
    excluded: list[str] | str
    layers: list[int] | None
    layers_pattern: list[str]

    @classmethod
    def read(cls, directory: Path) -> LoraConfig:
        """Reads the `adapter_config.json` of a folder.

        Fields that nothing reads are named in an `HFFolderWarning`.

        Args:
            directory: the folder.

        Raises:
            CheckpointError: it is missing or damaged, or asks for what is not supported.
        """
        data = _read_json(directory)
        fields = _Fields(data, directory)
        fields.check_kind()
        layers = fields.take("layers_to_transform", (int, list), "layers' numbers", None)
        pattern = fields.take("layers_pattern", (str, list), "a name or names", None)
        config = cls(
            where=directory,
            rank=fields.take("r", int, "a positive integer", 8),
            alpha=fields.take("lora_alpha", (int, float), "a number", 8),
            rslora=fields.take("use_rslora", bool, "true or false", False),
            rank_pattern=fields.take("rank_pattern", dict, "ranks by names", {}),
            alpha_pattern=fields.take("alpha_pattern", dict, "numbers by names", {}),
            targets=fields.take("target_modules", (str, list), "a name or names", []),
            excluded=fields.take("exclude_modules", (str, list), "a name or names", []),
            layers=[layers] if isinstance(layers, int) else layers or None,
            layers_pattern=[pattern] if isinstance(pattern, str) else pattern or [],
        )
        fields.check_rest()
        config._check()
        return config

    def _check(self) -> None:
        ranks = {"r": self.rank, **self.rank_pattern}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or rank < 1:
                raise self._wrong(name, "a positive integer", rank)
        for name, alpha in {"lora_alpha": self.alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise self._wrong(name, "a number", alpha)
        if not self.targets:
            raise CheckpointError(
                f"{ADAPTER} of an adapter names its modules in target_modules; that of "
                f"{self.where} names none. {MERGE_BY_PEFT}"
            )
        regular = [*self.rank_pattern, *self.alpha_pattern, *self.layers_pattern]
        for pattern in (*regular, *(x for x in (self.targets, self.excluded) if x)):
            try:
                if isinstance(pattern, str):
                    re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{ADAPTER} of {self.where} has the pattern {pattern!r}, and that is no "
                    f"regular expression: {error}. Correct it there."
                ) from None

    def _wrong(self, name: str, rule: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{ADAPTER} of {self.where}: {name} is {rule}, got {value!r}.")

    def rank_of(self, module: str) -> int:
        """R of a module's adapter."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """What the product of a module's two matrices is multiplied by.

        That is alpha / r (LoRA, arXiv 2106.09685, section 4.1), or alpha / sqrt(r) (rsLoRA,
        arXiv 2312.03732, section 3).
        """
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def has(self, module: str, *, head_or_embedding: bool) -> bool:
        """Whether the configuration gives a module an adapter.

        Args:
            module: its name.
            head_or_embedding: whether it is one of these, which "all-linear" leaves out.
        """
        if self.excluded and _named(self.excluded, module):
            return False
        if isinstance(self.targets, str) and self.targets.lower() == _ALL_LINEAR:
            return not head_or_embedding
        if not _named(self.targets, module):
            return False
        # A name in full, or an expression, says the layer itself.
        if self.layers is None or isinstance(self.targets, str) or module in self.targets:
            return True
        patterns = [rf"(?:.*?\.)?{name}\.(\d+)\." for name in self.layers_pattern] or [_NUMBERED]
        found = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return found is not None and int(found[1]) in self.layers


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    """What the first pattern gives that is a module's name, or its end after a dot."""
    fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, otherwise)


def _named(names: list[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _read_json(directory: Path) -> dict[str, Any]:
    file = directory / ADAPTER
    if not file.is_file():
        raise CheckpointError(
            f"An adapter is a folder with {ADAPTER} and its safetensors; {directory} has no "
            f"{ADAPTER}. Give the folder that peft's save_pretrained wrote."
        )
    data = downloaded_json(file)
    if not isinstance(data, dict):
        raise CheckpointError(f"{ADAPTER} is a JSON object with its fields; {file} is not.")
    return data


class _Fields:
    """The fields of an adapter_config.json, each taken once."""

    def __init__(self, data: dict[str, Any], where: Path):
        self._left = {name: value for name, value in data.items() if value is not None}
        self._where = where

    def take(self, name: str, kinds: Any, rule: str, default: Any) -> Any:
        """A field's value, of one of the kinds; what silence means where it is not there."""
        value = self._left.pop(name, default)
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        truth = isinstance(value, bool) and bool not in wanted  # true is 1 to Python
        if value is not default and (truth or not isinstance(value, wanted)):
            raise CheckpointError(f"{ADAPTER} of {self._where}: {name} is {rule}, got {value!r}.")
        return value

    def check_kind(self) -> None:
        """Whether it is a LoRA adapter of the plain kind."""
        kind = self._left.pop("peft_type", None)
        if kind != "LORA":
            raise self._refused("peft_type", kind, "LORA")
        if (bias := self._left.pop("bias", "none")) != "none":
            raise self._refused("bias", bias, "none")
        beginning = self._left.pop("init_lora_weights", True)
        if beginning not in _BEGINNINGS:
            supported = ", ".join(json.dumps(one) for one in _BEGINNINGS)
            raise self._refused("init_lora_weights", beginning, supported)
        for name, what in _REFUSED.items():
            if value := self._left.pop(name, None):
                raise CheckpointError(
                    f"{ADAPTER} of {self._where} asks for {what}, {listed([(name, value)])}, which "
                    f"is not supported. {MERGE_BY_PEFT}"
                )

    def check_rest(self) -> None:
        """Warns of fields that nothing reads; one that is empty changes nothing."""
        rest = {k: v for k, v in self._left.items() if v and k not in _HARMLESS}
        if rest:
            warn(
                f"{ADAPTER} of {self._where} has fields that nothing reads, and they are left out: "
                f"{listed(_sorted(rest.items()))}."
            )

    def _refused(self, name: str, value: Any, supported: str) -> CheckpointError:
        return CheckpointError(
            f"{name} {json.dumps(value)} of an adapter is not supported; supported: {supported}. "
            f"{self._where} has it in its {ADAPTER}. {MERGE_BY_PEFT}"
        )


def _sorted(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return sorted(pairs, key=lambda pair: pair[0])
