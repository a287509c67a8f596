"""Tasks that wait, and who gets which: each node's own, and those for whoever can do them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping

from holoray.actors.messages import Kind, Slot
from holoray.actors.roster import ANYWHERE, Node, Task, Worker


class Waiting:
    """Reads `nodes` and `workers` as they are whenever it is asked."""

    def __init__(self, nodes: Mapping[str, Node], workers: Mapping[str, Worker]) -> None:
        self._nodes, self._workers = nodes, workers
        self._fresh: deque[Task] = deque()
        self._refining: deque[Task] = deque()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._refining) + sum(len(node.queue) for node in self._nodes.values())

    def put(self, task: Task) -> None:
        self._queue_of(task).append(task)

    def put_first(self, task: Task) -> None:
        self._queue_of(task).appendleft(task)

    def skip(self, held: Collection[Slot]) -> None:
        """What was found on a node need not be ingested, though an answer that was never heard left it queued."""
        for queue in (self._fresh, self._refining):
            left = [task.without(held) for task in queue]
            queue.clear()
            queue.extend(task for task in left if task.units)

    def drop_vain(self) -> None:
        """Refining that no node could do any more: the next plan finds these slots again, from nothing."""
        nodes = self._nodes.values()
        left = [task for task in self._refining if any(node.has_base_of(task) for node in nodes)]
        self._refining = deque(left)

    def take(self, name: str) -> Task | None:
        """The next task of a worker, which does not wait any more."""
        for queue in self._queues(self._workers[name]):
            while task := next((task for task in queue if self._may_take(name, task)), None):
                queue.remove(task)
                if task.kind is not Kind.TRANSFER or self._crew_size(task.source):
                    return task
                # Its source is gone: the next plan finds these slots again, wherever they are then.
        return None

    def _queue_of(self, task: Task) -> deque[Task]:
        if task.node != ANYWHERE:
            return self._nodes[task.node].queue
        return self._refining if task.refines else self._fresh

    def _queues(self, worker: Worker) -> Iterator[deque[Task]]:
        """Where the worker finds work: on its node, and, once that is known, what it may ingest."""
        node = self._nodes[worker.node]
        yield node.queue
        if node.known:
            yield self._refining
            if worker.ingests:
                yield self._fresh

    def _may_take(self, name: str, task: Task) -> bool:
        """Whether a worker can do a task, and need not leave it to somebody else.

        It leaves what it failed in; a receiver leaves everything, unless it alone sits where the last generation is.
        """
        worker = self._workers[name]
        if task.node != ANYWHERE:
            return task.failed_on != name or self._crew_size(worker.node) == 1
        if not self._nodes[worker.node].has_base_of(task):
            return False
        if worker.ingests and task.failed_on != name:
            return True
        others = (other for other_name, other in self._workers.items() if other_name != name and other.ingests)
        return not any(self._nodes[other.node].has_base_of(task) for other in others)

    def _crew_size(self, node: str) -> int:
        return sum(worker.node == node for worker in self._workers.values())
