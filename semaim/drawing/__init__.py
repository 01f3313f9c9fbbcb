"""Everything that draws: from tensors, images and logged numbers to pictures. It builds no model.

panels.py lays out rows and columns, columns.py fills them from tensors, encoder.py from a pretraining network,
objects.py draws boxes, masks and class maps, curves.py the logged values of a run.
"""
