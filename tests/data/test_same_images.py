"""Images under several names are found by their bytes, and few files are read for it."""

from kepo_jax.data import image_files, same_images


def test_only_the_bytes_of_equal_sizes_are_read(tmp_path, monkeypatch):
  names = [tmp_path / f"{n}.png" for n in range(6)]
  for path, data in zip(names, (b"a", b"bb", b"bb", b"cc", b"ddd", b"bb"), strict=True):
    path.write_bytes(data)
  read = []
  whole = image_files.fingerprint
  monkeypatch.setattr(image_files, "fingerprint", lambda path: read.append(path) or whole(path))
  paths = [str(path) for path in names]
  assert same_images.repeats([*paths, "/absent.png"]) == {paths[2]: paths[1], paths[5]: paths[1]}
  assert read == [paths[1], paths[2], paths[3], paths[5]]
