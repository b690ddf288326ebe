"""Weights in diffusers' layout and back, without diffusers: folders of components, their configs, names and schedulers.

`convert.to_folder` and `convert.to_file` do the work of scripts/convert.py; `reader.read_folder` is how `ldm.checkpoint` reads a folder.
"""
