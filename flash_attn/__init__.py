"""Attention whose bits do not depend on how it was scheduled: flash_attn with a switch."""

from pkgutil import extend_path

# Other distributions may add subpackages to flash_attn (flash_attn.cute, for one).
__path__ = extend_path(__path__, __name__)

__version__ = "2.8.3+deterministic"

from flash_attn.determinism import (
    deterministic,
    explain,
    is_deterministic,
    reduce_partials,
    set_deterministic,
)
from flash_attn.faults import check_device
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "check_device",
    "deterministic",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "is_deterministic",
    "reduce_partials",
    "set_deterministic",
]
