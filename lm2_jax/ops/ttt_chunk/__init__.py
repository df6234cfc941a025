"""Test-time training in chunks, the update of the Titans and TTT memories.

`ref` is the definition, token by token. `chunk` computes a chunk of one head with matrix products, `step` extends an
unfinished chunk (streaming), and `sharded` applies `chunk` to all rows and heads on one or more devices.
"""
