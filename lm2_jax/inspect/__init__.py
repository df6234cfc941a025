"""What a memory reads, writes and forgets: `python -m lm2_jax.inspect --workdir W --text FILE --out DIR`.

`collect` runs a text through a trained model and keeps diagnostics, `pictures` draws them, `page` makes the report.
What can be shown is found in what the model gives, and not by the kind of its memory.
"""
