"""The built-in dataset: scenes of coloured shapes, put into words and drawn, all by a seed."""
