"""The native engine: joins two sockets and moves bytes between them without Python.

Owns: every descriptor handed to relay() until its completion, the worker threads, and all
memory they use. This file is the control plane, called from one Python thread, and never
blocks except in close(). What the workers do is in fastcopy/*.pxi, included below; they
hold no Python state and never take the GIL. _pycopy.py is the same thing in plain Python.
"""

import atexit
import collections
import dataclasses
import errno as _errno
import os
import time
import warnings
import weakref

from nodepass.errors import EngineClosed, EngineError

from libc.errno cimport (
    EAGAIN,
    EBADF,
    ECONNRESET,
    EINTR,
    EINVAL,
    EIO,
    ENOMEM,
    ENOSYS,
    ENOTCONN,
    ENOTSOCK,
    EPERM,
    EPROTOTYPE,
    errno,
)
from libc.stdint cimport int32_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from nodepass._linux cimport *

include "fastcopy/sys.pxi"
include "fastcopy/atomic.pxi"
include "fastcopy/slab.pxi"
include "fastcopy/ring.pxi"
include "fastcopy/pipe.pxi"
include "fastcopy/loop.pxi"
include "fastcopy/flow.pxi"
include "fastcopy/tcp.pxi"
include "fastcopy/order.pxi"

ABI = 1
REASON_FINISHED = R_FINISHED
REASON_RESET = R_RESET
REASON_ABORTED = R_ABORTED
REASON_IDLE = R_IDLE

Completion = collections.namedtuple(
    "Completion", ("token", "up", "down", "reason", "side", "code"), module=__name__
)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of an engine's counters and balances."""

    threads: int
    flows_open: int
    flows_total: int
    flows_refused: int
    bytes_up: int
    bytes_down: int
    parked_bytes: int
    buffers_in_use: int
    pipes_in_use: int
    pipes_pooled: int
    splice_promotions: int
    turns: int
    wakeups: int
    stale_events: int
    bugs: int
    fds_open: int


cdef enum:
    MAX_THREADS = 256           # more cores than that have other problems
    MAX_FLOWS = 1 << 24         # slots must fit into 31 bits of event data; 4 GiB of table

cdef object _engines = weakref.WeakSet()
cdef int _forks = 0             # of our ancestors since the module was loaded


def _count_fork():
    global _forks
    _forks += 1


def _close_all():
    for engine in list(_engines):
        engine.close()


os.register_at_fork(after_in_child=_count_fork)
# A net only: whoever makes an engine closes it. Workers hold no Python state, so one that
# is left over harms nobody, but its flows would be cut in mid-air instead of reset.
atexit.register(_close_all)


def _large_pipe_budget(int threads):
    # Half of what the kernel grants this user in all; other programs want pipes, too.
    try:
        with open("/proc/sys/fs/pipe-user-pages-soft") as source:
            pages = int(source.read()) or 1 << 20       # 0: no limit
    except (OSError, ValueError):
        pages = 16384
    return min(MAX_PIPES, pages * os.sysconf("SC_PAGE_SIZE") // 2 // PIPE_BYTES // threads)


cdef class Engine:
    """Native threads that join pairs of sockets and move bytes between them.

    Args:
        threads: worker threads, 1..256.
        flows: how many pairs may be open at once; memory is used only for those that are.
        splice: let the kernel move bulk data without copying it through user space.

    Raises:
        ValueError: an argument is out of range.
        EngineError: no descriptors, threads or memory.
    """

    cdef Core* core
    cdef int pid
    cdef int forks
    cdef bint is_closed
    cdef object __weakref__

    def __cinit__(self):
        self.core = NULL
        self.pid = -1
        self.forks = 0
        self.is_closed = True

    def __init__(self, threads=1, *, flows=65536, splice=True):
        cdef int rc
        cdef uint32_t i
        if self.core != NULL:
            raise EngineError("init", _errno.EALREADY)
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads: {threads} is not within 1..{MAX_THREADS}")
        if not 1 <= flows <= MAX_FLOWS:
            raise ValueError(f"flows: {flows} is not within 1..{MAX_FLOWS}")
        rc = core_open(threads, flows, &self.core)
        if rc < 0:
            raise EngineError("memory", -rc)
        self.pid = getpid()
        self.forks = _forks
        self.core.use_splice = bool(splice)
        self.core.large_pipes = _large_pipe_budget(threads)
        self.core.notify = sys_eventfd()
        self.core.done = sys_eventfd()
        rc = min(self.core.notify, self.core.done, 0)
        if rc == 0:
            for i in range(self.core.threads):
                self.core.references += 1       # before the thread that will drop it exists
                rc = worker_start(&self.core.workers[i])
                if rc < 0:
                    self.core.references -= 1
                    break
        if rc < 0:
            self.is_closed = False
            self.close()
            raise EngineError("start", -rc)
        self.is_closed = False
        _engines.add(self)

    def __dealloc__(self):
        cdef uint32_t i
        if self.core == NULL:
            return
        if self.is_inherited():
            core_unmap(self.core)       # the fds and the threads are the parent's
            return
        if not self.is_closed:
            # Threads may be running: tell them to go and let the last one free the tables.
            for i in range(self.core.threads):
                worker_stop(&self.core.workers[i])
        for i in range(self.core.threads):
            if self.core.workers[i].is_started and not self.core.workers[i].is_joined:
                pthread_detach(self.core.workers[i].thread)
        core_release(self.core)
        if not self.is_closed:
            warnings.warn("an Engine was dropped without close()", ResourceWarning)

    def __repr__(self):
        if self.core == NULL or self.is_closed:
            return "<Engine closed>"
        return f"<Engine threads={self.core.threads} flows={self.core.open_count}>"

    # The pid alone may come again in a grandchild, and a fork by native code alone is not
    # counted: either one tells that the threads and descriptors are an ancestor's.
    cdef bint is_inherited(self):
        return self.pid != getpid() or self.forks != _forks

    cdef int check(self, str operation) except -1:
        if self.is_inherited() or self.core == NULL:
            raise EngineClosed(operation, _errno.ECHILD)
        if self.is_closed:
            raise EngineClosed(operation, _errno.ESHUTDOWN)
        return 0

    def fileno(self):
        """Return the descriptor that is readable while completions wait.

        Returns:
            An eventfd for the event loop to watch; it stays the engine's.

        Raises:
            EngineClosed: after close(), or in a forked child.
        """
        self.check("fileno")
        return self.core.notify

    def relay(self, fd_a, fd_b, *, tls_a=None, tls_b=None, head_a=b"", head_b=b"", idle=0.0):
        """Join two connected non-blocking stream sockets.

        Args:
            fd_a: descriptor of one side.
            fd_b: descriptor of the other side.
            tls_a: must be None.
            tls_b: must be None.
            head_a: bytes already read from a; they reach b before anything else.
            head_b: bytes already read from b; they reach a before anything else.
            idle: seconds without a byte in either direction that end the flow; 0 = never.

        Returns:
            A token, > 0. Both descriptors are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns both descriptors.
            EngineClosed: after close(), or in a forked child.
            ValueError: the idle limit is out of range.

        After: one Completion with this token comes out of poll().
        """
        cdef int a = fd_a
        cdef int b = fd_b
        cdef double seconds = idle
        cdef bytes first_up = head_a
        cdef bytes first_down = head_b
        cdef const char* up = first_up
        cdef const char* down = first_down
        cdef int rc
        cdef uint32_t slot
        cdef uint32_t i
        cdef Flow* flow
        cdef Worker* w
        self.check("relay")
        if tls_a is not None or tls_b is not None:
            raise EngineError("relay", _errno.EOPNOTSUPP)
        if not 0.0 <= seconds <= 4e6:           # milliseconds must fit into 32 bits
            raise ValueError(f"idle: {idle} is not within 0..4000000 seconds")
        rc = sys_check_socket(a)
        if rc == 0:
            rc = sys_check_socket(b)
        if rc == 0 and a == b:
            rc = -EINVAL
        if rc < 0:
            raise EngineError("relay", -rc)
        slot = slot_take(self.core)
        if slot == NONE_SLOT:
            self.core.refused += 1
            raise EngineError("relay", _errno.ENOBUFS)
        flow = &self.core.flows[slot]
        w = &self.core.workers[0]
        for i in range(1, self.core.threads):
            if self.core.workers[i].load < w.load:
                w = &self.core.workers[i]
        flow_prepare(flow, a, b, w.index, <uint32_t>(seconds * 1000 + 0.999))
        rc = flow_park_head(&flow.ways[0], up, len(first_up))
        if rc == 0:
            rc = flow_park_head(&flow.ways[1], down, len(first_down))
        if rc < 0:
            flow_undo(flow)
            slot_give(self.core, slot)
            raise EngineError("relay", -rc)
        w.load += 1
        self.core.total += 1
        order_put(w, flow, slot, ORDER_ADMIT)
        return token_of(flow, slot)

    def live(self, token):
        """Return the running byte counts of a flow.

        Args:
            token: what relay() returned.

        Returns:
            (up, down): bytes delivered a to b and b to a; None once its completion was
            polled.
        """
        cdef Flow* flow = self.find(token)
        if flow == NULL:
            return None
        return load_relaxed64(&flow.ways[0].delivered), load_relaxed64(&flow.ways[1].delivered)

    def abort(self, token):
        """Reset both sides of a flow; unknown and finished flows are left alone.

        Args:
            token: what relay() returned.

        After: its completion follows, with REASON_ABORTED unless the flow ended first.
        """
        cdef Flow* flow
        self.check("abort")
        flow = self.find(token)
        if flow != NULL and not flow.abort_asked:
            flow.abort_asked = 1
            order_put(&self.core.workers[flow.worker], flow, <uint32_t>(flow - self.core.flows),
                      ORDER_ABORT)

    cdef Flow* find(self, token):
        cdef uint64_t value
        cdef uint32_t slot
        cdef Flow* flow
        if self.core == NULL or self.is_inherited() or not 0 < token < 1 << 63:
            return NULL
        value = token
        slot = <uint32_t>value
        if slot >= self.core.fresh:
            return NULL
        flow = &self.core.flows[slot]
        return flow if load_relaxed32(&flow.generation) == <uint32_t>(value >> 32) else NULL

    def poll(self):
        """Collect the flows that have ended.

        Returns:
            Every waiting Completion, possibly none; never blocks. Also works after
            close(), for the flows that close() aborted.

        Raises:
            EngineClosed: in a forked child.
        """
        cdef list result = []
        cdef uint64_t slot = 0
        cdef uint32_t i
        cdef Worker* w
        cdef Flow* flow
        if self.is_inherited() or self.core == NULL:
            raise EngineClosed("poll", _errno.ECHILD)
        if self.core.notify >= 0:
            sys_unring(self.core.notify)
            exchange32(&self.core.notify_rung, 0)
        for i in range(self.core.threads):
            w = &self.core.workers[i]
            while ring_get(&w.outbox, &slot):
                flow = &self.core.flows[slot]
                result.append(Completion(
                    token_of(flow, <uint32_t>slot), load_relaxed64(&flow.ways[0].delivered),
                    load_relaxed64(&flow.ways[1].delivered), flow.reason, flow.side, flow.code,
                ))
                w.load -= 1
                slot_give(self.core, <uint32_t>slot)
        return result

    def statistics(self):
        """Return a snapshot of all counters; also after close().

        Raises:
            EngineClosed: in a forked child.
        """
        cdef Counters total
        cdef uint32_t i
        if self.is_inherited() or self.core == NULL:
            raise EngineClosed("statistics", _errno.ECHILD)
        memset(&total, 0, sizeof(total))
        for i in range(self.core.threads):
            counters_add(&total, &self.core.workers[i].counters)
        return EngineStatistics(
            threads=self.core.threads,
            flows_open=self.core.open_count,
            flows_total=self.core.total,
            flows_refused=self.core.refused,
            bytes_up=total.bytes_up,
            bytes_down=total.bytes_down,
            parked_bytes=total.parked_bytes,
            buffers_in_use=total.buffers_in_use + total.heads_open,
            pipes_in_use=total.pipes_in_use,
            pipes_pooled=total.pipes_pooled,
            splice_promotions=total.splice_promotions,
            turns=total.turns,
            wakeups=total.wakeups,
            stale_events=total.stale_events,
            bugs=total.bugs,
            fds_open=total.fds_open,
        )

    def close(self, deadline=5.0):
        """Reset every flow and join the threads.

        Args:
            deadline: seconds to wait for the threads.

        Returns:
            True when every thread has been joined (at once if closed before), False when
            the deadline passed first; then close() may be called again.

        After: poll() once more for the completions of the flows that were open. Stop
            watching fileno() before; its number is free afterwards.
        """
        cdef double until = time.monotonic() + deadline
        cdef uint32_t i
        cdef uint32_t left = 0
        cdef int wait_ms
        if self.core == NULL or self.is_inherited():
            return True
        if not self.is_closed:
            self.is_closed = True
            _engines.discard(self)
            for i in range(self.core.threads):
                worker_stop(&self.core.workers[i])
        while True:
            left = workers_join(self.core)
            if left == 0:
                core_close_events(self.core)
                return True
            wait_ms = <int>min(max((until - time.monotonic()) * 1000, 0), 1e9)
            if wait_ms == 0:
                return False
            with nogil:
                sys_wait_readable(self.core.done, wait_ms)
                sys_unring(self.core.done)
