"""The registry: every way of computing attention that this version can run, by canonical name.

An implementation is one file here with `SUMMARY`, `ALIASES`, `check(request) -> list[Reason]` and
`attention(queries, keys, values, mask, *, scale, dropout) -> (context, weights or None)`; `OPTIONS` names
further keyword arguments that it takes. To add one, add its file and its line here; nothing else changes.
"""

from CMHA.implementations import eager, flash_tiled, sdpa

IMPLEMENTATIONS = {
    "eager": eager,
    "sdpa": sdpa,
    "flash_tiled": flash_tiled,
}
