"""Activations of rows so wide that threads hold them as words, of several sequences.

A kernel collects what a segment is given, and does nothing else. So rows are as wide as large
models' are, and there are no products for a CPU to make.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import dims_of, small_config
from mosaic_machine import MosaicMachine, run
from stream_cases import machine

from pallas_kernels.dims import DecodeWeights, Dims, WeightBits
from pallas_kernels.launch import StepState
from pallas_kernels.mosaic_gpu import launch as launching
from pallas_kernels.stream import plan as plans
from pallas_kernels.stream.activations import collect_activations
from pallas_kernels.stream.env import StreamEnv
from pallas_kernels.stream.exchange_order import word_in_exchange
