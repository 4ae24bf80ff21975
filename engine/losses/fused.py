from engine.losses.tiles import Tiles as tiles_for
