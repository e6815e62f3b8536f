"""Files of watched directories against a disk that refuses: nothing is lost, and it is said."""

import asyncio

from lone_engine import lone_engine

from firewall.agent.following import Following
from firewall.agent.loading import read
from firewall.kvstore.sqlite import SqliteStore

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}}}
spec: {{endpointSelector: {{}}, ingress: [{{fromEntities: [world]}}]}}
"""


class Scene:
    """A lone engine that follows two directories."""

    def __init__(self, engine, folder):
        self.engine, self.problems, self.state = engine, {}, folder / "state"
        self.following = Following(engine, engine.config, self.problems)

    async def look(self, *, disk):
        """Look once; without a disk the state cannot be written."""
        aside = self.state.with_name("aside")
        if not disk:
            self.state.rename(aside)
        await self.following.look()
        if not disk:
            aside.rename(self.state)

    def policies(self):
        return {one.key.name for one in self.engine.book.repository.objects}


def play(tmp_path, scenes):
    for name in ("policies", "endpoints"):
        (tmp_path / name).mkdir()

    (tmp_path / "state").mkdir()
    config = read(
        f"state_dir: {tmp_path}/state\n"
        f"policy: {{directory: {tmp_path}/policies}}\n"
        f"endpoint_directory: {tmp_path}/endpoints"
    ).config

    async def run():
        store = await SqliteStore.open(tmp_path / "identities.db")
        try:
            await scenes(Scene(lone_engine(config, store), tmp_path))
        finally:
            await store.close()

    asyncio.run(run())


def test_policies_of_files_come_into_force_once_the_disk_takes_them(tmp_path):
    """One file goes while another comes, and neither can be written down at first."""
    files = tmp_path / "policies"

    async def scenes(scene):
        (files / "old.yaml").write_text(POLICY.format(name="old"))
        await scene.look(disk=True)
        assert scene.policies() == {"old"}
        (files / "old.yaml").unlink()
        (files / "new.yaml").write_text(POLICY.format(name="new"))
        await scene.look(disk=False)
        assert scene.policies() == {"old"}
        said = scene.problems["policy.directory"]
        assert "old.yaml not persisted" in said
        assert "new.yaml not persisted" in said
        await scene.look(disk=True)
        assert scene.policies() == {"new"}
        assert not scene.problems

    play(tmp_path, scenes)


def test_endpoints_of_files_are_written_down_once_the_disk_takes_them(tmp_path):
    """They are in force at once; a restart must find them all the same."""
    files = tmp_path / "endpoints"

    async def scenes(scene):
        (files / "a.yaml").write_text("{name: a, addresses: [10.0.0.1], labels: [app=a]}")
        (files / "b.yaml").write_text("{name: b, addresses: [10.0.0.2], labels: [app=b]}")
        await scene.look(disk=False)
        said = scene.problems["endpoint_directory"]
        assert "a.yaml not persisted" in said
        assert "b.yaml not persisted" in said
        await scene.look(disk=True)
        assert not scene.problems
        kept = (scene.state / "endpoints").read_text()
        assert '"10.0.0.1"' in kept
        assert '"10.0.0.2"' in kept

    play(tmp_path, scenes)
