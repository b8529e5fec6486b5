"""Workers that pull: in this process, in several, or on several machines as Ray actors.

Each worker has at most ``room`` items at a time and gets the next when it has answered one, so that none waits for another.
What a worker held that died goes to the others.
"""

import collections
import os
import traceback
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from paddlemix.errors import ConfigError, UserError

__all__ = ["answers", "number"]

_NUMBER = "PADDLEMIX_WORKER"


def number():
    """Which of several worker processes this one is, from 0: where each takes a card of its own."""
    return int(os.environ.get(_NUMBER, 0))


def answers(make, args, items, room, processes=1, ray=None):
    """Yield (tag, answer) of each item, as they come.

    Args:
        make: a function of a module; ``make(*args)`` gives a worker, whose ``answer(item)`` is called from ``room`` threads.
        items: (tag, item) pairs.
        room: items that a worker has at once.
        processes: workers; None for one, or one for each of Ray's machines.
        ray: address of a Ray cluster, ``local`` to start one here; None for processes of this machine.

    Raises:
        UserError: of ``make``; or every worker has died.
    """
    items = iter(items)
    if ray is not None:
        return _on_ray(make, args, items, room, processes, ray)
    return _in_processes(make, args, items, room, processes) if (processes or 1) > 1 else _here(make, args, items, room)


def _here(make, args, items, room):
    worker = make(*args)
    running = {}
    with ThreadPoolExecutor(room) as pool:
        while True:
            while len(running) < room and (found := next(items, None)) is not None:
                running[pool.submit(worker.answer, found[1])] = found[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _work(connection, make, args, room, place):
    """A process of its own: (tag, item) comes in, (tag, answer) goes out; (None, text) first, '' when it is ready."""
    import threading

    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ[_NUMBER] = str(place)
    lock = threading.Lock()

    def send(value):
        with lock:
            connection.send(value)

    def answer(tag, item):
        try:
            send((tag, worker.answer(item)))
        except BaseException:  # nobody would ask for what went wrong in a thread: the others take over
            traceback.print_exc()
            os._exit(1)

    try:
        worker = make(*args)
    except (UserError, OSError) as error:
        return send((None, str(error)))
    send((None, ""))
    with ThreadPoolExecutor(room) as pool:
        while True:
            try:
                tag, item = connection.recv()
            except EOFError:
                os._exit(0)  # nobody listens any more
            pool.submit(answer, tag, item)


def _in_processes(make, args, items, room, processes):
    import multiprocessing
    from multiprocessing import connection as connections

    context = multiprocessing.get_context("spawn")
    workers, held, again, problem = {}, {}, collections.deque(), "it was ended from outside, or memory ran out"
    for place in range(processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, make, args, room, place), daemon=True)
        process.start()
        theirs.close()
        workers[ours] = process
    ready = set()

    def fill(worker):
        own = held[worker]
        while len(own) < room:
            found = again.popleft() if again else next(items, None)
            if found is None:
                return
            own[found[0]] = found[1]
            try:
                worker.send(found)
            except OSError:  # it has died, which reading from it tells
                return

    try:
        while workers:
            for worker in connections.wait(list(workers)):
                try:
                    tag, answer = worker.recv()
                except (EOFError, OSError):
                    workers.pop(worker).join()
                    again.extend(held.pop(worker, {}).items())
                    for other in ready & set(workers):
                        fill(other)
                    continue
                if tag is None:
                    if answer:
                        raise ConfigError(answer)
                    ready.add(worker)
                    held[worker] = {}
                else:
                    held[worker].pop(tag)
                    yield tag, answer
                fill(worker)
            if not again and len(ready) == len(held) and not any(held.values()) and ready:
                found = next(items, None)
                if found is None:
                    return
                again.append(found)
                for worker in ready & set(workers):
                    fill(worker)
    finally:
        for process in workers.values():
            process.terminate()
    raise ConfigError(f"every process has died ({problem}): the same command goes on with what is left")


def _on_ray(make, args, items, room, actors, address):
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'paddlemix[cluster]'") from None
    options = {"ignore_reinit_error": True, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=None if address == "local" else address, **options, **_local(address))
    except (ConnectionError, ValueError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"--ray {address}: no cluster answers there ({text})") from None
    count = actors or sum(node["Alive"] for node in ray.nodes())
    gpus = 1 if any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes()) else 0

    class Worker:
        def __init__(self):
            self.problem, self.worker = None, None
            try:
                self.worker = make(*args)
            except UserError as error:
                self.problem = str(error)

        def answer(self, item):
            return self.problem, None if self.problem else self.worker.answer(item)

    try:
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=room, scheduling_strategy="SPREAD")(Worker)
        workers = [actor.remote() for _ in range(count)]
        running, again, free = {}, collections.deque(), collections.deque(worker for _ in range(room) for worker in workers)
        while True:
            while free and (found := again.popleft() if again else next(items, None)) is not None:
                worker = free.popleft()
                running[worker.answer.remote(found[1])] = (worker, found)
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            worker, found = running.pop(done)
            try:
                problem, answer = ray.get(done)
            except ray.exceptions.RayActorError:
                again.append(found)
                free = collections.deque(other for other in free if other is not worker)
                if not free and not running:
                    raise ConfigError("every actor has died: the same command goes on with what is left") from None
                continue
            if problem:
                raise ConfigError(problem)
            free.append(worker)
            yield found[0], answer
    finally:
        ray.shutdown()


def _local(address):
    return {"include_dashboard": False} if address == "local" else {}
