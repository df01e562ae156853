"""Which implementation answers a request, and why: request -> reasons of each -> AttentionChoice."""

from CMHA.choosing.choose import AttentionChoice, AttentionSettings, announce, choose
from CMHA.choosing.device import detect_device_type
from CMHA.choosing.names import canonical_name, did_you_mean, known_names
from CMHA.choosing.report import attention_report

__all__ = [
    "AttentionChoice",
    "AttentionSettings",
    "announce",
    "attention_report",
    "canonical_name",
    "choose",
    "detect_device_type",
    "did_you_mean",
    "known_names",
]
