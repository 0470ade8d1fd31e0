from fused_lora._version import __version__
from fused_lora.binary import FusedLoRAWarning
from fused_lora.ops import clear_cast_cache, dropout_mask, lora_linear
from fused_lora.paths import explain, use_path
