"""Index tables of prompts and images, made on the host: the device only ever sees padded arrays."""

import numpy as np

from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig

Grid = tuple[int, int, int]  # frames, patch rows, patch columns


def _check_grid(grid: Grid, merge: int) -> None:
  frames, rows, columns = grid
  if frames != 1:
    raise ValueError(f"grid {grid}: {frames} frames; videos are not supported, only still images")
  if rows % merge or columns % merge or not rows or not columns:
    raise ValueError(f"grid {grid}: rows and columns must be positive multiples of {merge} patches")


def prompt_positions(tokens: list[int], grids: list[Grid], config: Qwen3VLConfig) -> tuple[np.ndarray, int, np.ndarray]:
  """Returns position ids of one prompt, without padding.

  Text counts upwards on all three axes. An image that starts at p holds (p, p + row, p + column) on its merged
  grid; the token after it continues at the maximum of all axes plus one.

  Args:
    tokens: S token ids; an image is a run of `image_token_id`, one per merged image token.
    grids: patch grid of each image, in prompt order.
    config: sizes and special tokens.

  Returns:
    positions int32[3, S] (temporal, height, width), the position of the next token, and image_slot int32[S]:
    the merged image row that replaces a token, counted over all images of the prompt, -1 elsewhere.

  Raises:
    ValueError: the number of image tokens is not what the grids need, or the prompt holds a video token.
  """
  merge = config.vision.spatial_merge_size
  for grid in grids:
    _check_grid(grid, merge)
  ids = np.asarray(tokens, np.int32)
  if (ids == config.video_token_id).any():
    raise ValueError(f"the prompt holds the video token {config.video_token_id}; videos are not supported")
  is_image = ids == config.image_token_id
  needed = sum(rows * columns for _, rows, columns in grids) // merge**2
  if is_image.sum() != needed:
    raise ValueError(f"the prompt holds {is_image.sum()} image tokens, its {len(grids)} images need {needed}")

  positions = np.zeros((3, len(ids)), np.int32)
  image_slot = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
  remaining = list(grids)
  index = position = 0
  while index < len(ids):
    if not is_image[index]:
      positions[:, index] = position
      index, position = index + 1, position + 1
      continue
    _, rows, columns = remaining.pop(0)
    rows, columns = rows // merge, columns // merge
    stop = index + rows * columns
    if not is_image[index:stop].all():
      raise ValueError(f"the image tokens from token {index} on are fewer than the {rows * columns} of their image")
    positions[0, index:stop] = position
    positions[1, index:stop] = position + np.repeat(np.arange(rows), columns)
    positions[2, index:stop] = position + np.tile(np.arange(columns), rows)
    index, position = stop, position + max(rows, columns)
  return positions, position, image_slot


def _merge_block_order(rows: int, columns: int, merge: int) -> np.ndarray:
  """Returns int32[rows * columns, 2]: (row, column) of each patch, block of merge x merge patches after block."""
  grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
  blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
  return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2).astype(np.int32)


def _table_lines(index: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns two table lines and their weights, [r, 2], for each position along an axis of `size` patches."""
  source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
  low = np.floor(source)
  fraction = source - low
  lines = np.minimum(low[:, None].astype(np.int32) + np.arange(2, dtype=np.int32), side - 1)
  return lines, np.stack([1 - fraction, fraction], axis=1)


def vision_tables(grids: list[Grid], config: Qwen3VLConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns index tables of the vision tower for all images of one prompt, rows in merge-block order.

  The position table is resampled to each image's grid bilinearly with aligned corners.

  Args:
    grids: patch grid of each image, in prompt order.
    config: sizes.

  Returns:
    segments int32[R], number of the image; coordinates int32[R, 2], (row, column) in patches;
    table_index int32[R, 4] and table_weight float32[R, 4], rows of the position table and their weights.

  Raises:
    ValueError: a grid of several frames, or one that does not divide into merge blocks.
  """
  side, merge = config.vision.table_side, config.vision.spatial_merge_size
  parts = [_image_tables(number, grid, side, merge) for number, grid in enumerate(grids)]
  empty = (np.zeros(0, np.int32), np.zeros((0, 2), np.int32), np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32))
  segments, coordinates, index, weight = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
  return segments, coordinates, index, weight


def _image_tables(number: int, grid: Grid, side: int, merge: int) -> tuple[np.ndarray, ...]:
  _check_grid(grid, merge)
  _, rows, columns = grid
  coordinates = _merge_block_order(rows, columns, merge)
  row_lines, row_weights = _table_lines(coordinates[:, 0], rows, side)
  column_lines, column_weights = _table_lines(coordinates[:, 1], columns, side)
  index = row_lines[:, :, None] * side + column_lines[:, None, :]
  weight = row_weights[:, :, None] * column_weights[:, None, :]
  segments = np.full(len(coordinates), number, np.int32)
  return segments, coordinates, index.reshape(-1, 4), weight.reshape(-1, 4)
