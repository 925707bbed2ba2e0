"""Real fine-tunes of real models: what truly happens to refusals, step by step.

`align.py` makes a model refuse, `jobs.py` lists the fine-tunes, `truth.py` carries one out with
`transformers.Trainer` and measures on the way, `__main__.py` is the command. Nothing here uses
arisk: the truth must not share a mistake with the forecasts that are judged by it.
"""
