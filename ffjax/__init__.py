from ffjax.cache import KVCache
from ffjax.config import PRESETS, ModelConfig, RopeScaling, preset
from ffjax.model import Transformer
from ffjax.decode import DecodeOutput, decode_step
