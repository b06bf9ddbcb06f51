"""SIGKILL in the middle of an update, of a save and of its checksums: the run becomes what it would have been."""

from tests.training import kill


def test_a_killed_run_continues_to_the_bit(tmp_path):
  runs, different, kills = kill.main(3, seed=5, folder=tmp_path, phases=("update", "saving", "checksums"))
  assert different == [] and runs == 1
  assert [phase for _, _, phase, _, _ in kills] == ["update", "saving", "checksums"]
