from kepo_jax import memory


def test_the_figure_of_proc_is_read_and_without_it_that_of_getrusage(monkeypatch, tmp_path):
  exact = memory.peak_resident_bytes()
  assert exact > 1e7
  monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
  assert memory.peak_resident_bytes() >= 0.99 * exact  # inherited over exec, so no smaller
  # VmHWM is the most that this process held, whoever started it; see proc_pid_status(5).
  (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t   300 kB\nVmHWM:\t   200 kB\nVmRSS:\t   100 kB\n")
  assert memory.peak_resident_bytes() == 200 * 1024
