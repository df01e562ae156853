"""Which implementation answers a request, and why: request -> reasons of each -> AttentionChoice."""

from CMHA.choosing.choose import AttentionChoice, AttentionSettings, announce, choose, decide
from CMHA.choosing.device import detect_device_type
from CMHA.choosing.flash_config import HAS_FLASH_ATTN_2, get_flash_attention_config, is_flash_attention_supported
from CMHA.choosing.names import canonical_name, did_you_mean, known_names
from CMHA.choosing.report import attention_report

__all__ = [
    "HAS_FLASH_ATTN_2",
    "AttentionChoice",
    "AttentionSettings",
    "announce",
    "attention_report",
    "canonical_name",
    "choose",
    "decide",
    "detect_device_type",
    "did_you_mean",
    "get_flash_attention_config",
    "is_flash_attention_supported",
    "known_names",
]
