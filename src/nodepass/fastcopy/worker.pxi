# The worker thread: one epoll set, one inbox, a ready list with budgets, a timer wheel.
#
#   epoll_wait -> events set bits and queue flows -> inbox orders -> one turn per ready flow
#        ^                                                              |
#        +---- completions published <- idle wheel <--------------------+
#
# A flow found dead during a round goes to the grave list and is published only at the end
# of the round: nobody can hold a stale pointer to a slot that Python has recycled.
# Nothing here may touch Python, allocate, or block outside epoll_wait.

cdef enum:
    WAKE_TAG = 0                # event data of the wake eventfd; flows have a generation > 0


# -> 0 or -errno. Open the fds of a worker and start its thread; on failure whatever was
# opened is closed again. Runs on: control plane.
cdef int worker_start(Worker* w) noexcept nogil:
    cdef sigset_t blocked
    cdef sigset_t before
    cdef int rc = 0
    w.core.references += 1      # before the thread that will drop it exists
    w.wake = sys_eventfd()
    w.epoll = sys_epoll_open()
    if w.wake < 0 or w.epoll < 0:
        rc = w.wake if w.wake < 0 else w.epoll
    if rc == 0:
        rc = sys_epoll_add(w.epoll, w.wake, WAKE_TAG)
    if rc == 0:
        # Signals belong to Python's threads. The new thread inherits the mask of its maker;
        # faults stay open, or a crash would be a hang. SIGPIPE is among the blocked: splice
        # raises it.
        sigfillset(&blocked)
        sigdelset(&blocked, SIGSEGV)
        sigdelset(&blocked, SIGBUS)
        sigdelset(&blocked, SIGFPE)
        sigdelset(&blocked, SIGILL)
        pthread_sigmask(SIG_SETMASK, &blocked, &before)
        rc = -pthread_create(&w.thread, NULL, worker_main, w)
        pthread_sigmask(SIG_SETMASK, &before, NULL)
    if rc == 0:
        w.is_started = 1
        pthread_setname_np(w.thread, b"nodepass-engine")
        return 0
    w.core.references -= 1
    if w.wake >= 0:
        sys_close(w.wake)
    if w.epoll >= 0:
        sys_close(w.epoll)
    w.wake = -1
    w.epoll = -1
    return rc


cdef void* worker_main(void* argument) noexcept nogil:
    cdef Worker* w = <Worker*>argument
    cdef Core* core = w.core
    cdef int n
    cdef int i
    w.now_ms = sys_now_ms()
    w.tick = w.now_ms // TICK_MS
    while True:
        n = sys_epoll_wait(w.epoll, w.events, MAX_EVENTS, worker_timeout(w))
        w.now_ms = sys_now_ms()
        add_own64(&w.counters.wakeups, 1)
        NP_BUG(n < 0, &w.counters.bugs, b"epoll_wait failed")
        for i in range(n):
            worker_event(w, &w.events[i])
        worker_run_ready(w)
        wheel_run(w)
        pulse_run(w)
        worker_publish(w)
        if load_acquire32(&w.stop):
            break
    worker_leave(w)
    sys_ring(core.done)
    core_release(core)
    return NULL


# -> milliseconds that epoll_wait may sleep; -1: until something happens.
cdef inline int worker_timeout(Worker* w) noexcept nogil:
    cdef uint64_t due
    if w.ready.count or w.looks_left:
        return 0
    if w.wheel_count == 0 and w.look_ms == 0:
        return -1
    due = w.wheel_next * TICK_MS if w.wheel_count else w.look_ms
    if 0 < w.look_ms < due:
        due = w.look_ms
    return <int>(due - w.now_ms) + 1 if due > w.now_ms else 0


# One event: note the kernel's word and queue the flow.
cdef void worker_event(Worker* w, epoll_event* event) noexcept nogil:
    cdef uint64_t tag = event.data.u64
    cdef uint32_t what = event.events
    cdef uint32_t slot = (<uint32_t>tag) >> 1
    cdef int side = <int>(tag & 1)
    cdef Flow* flow
    cdef Leg* leg
    if tag == WAKE_TAG:
        worker_run_inbox(w)
        return
    flow = &w.core.flows[slot]
    if load_relaxed32(&flow.generation) != <uint32_t>(tag >> 32) or (
        load_relaxed32(&flow.state) != FLOW_OPEN
    ):
        add_own64(&w.counters.stale_events, 1)
        return
    leg = &flow.legs[side]
    if what & EPOLLERR:
        leg.bits |= SEEN_ERROR
    if what & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
        leg.bits |= MAY_READ
    if what & (EPOLLOUT | EPOLLHUP | EPOLLERR):
        leg.bits |= MAY_WRITE
    if what & (EPOLLRDHUP | EPOLLHUP):
        leg.bits |= SEEN_RDHUP
    if what & EPOLLPRI:
        leg.bits |= SEEN_URGENT
    flow_want_turn(w, flow, slot)


# Orders of the control plane. The flag is cleared before the scan (see ring_bell); the
# eventfd is edge-triggered and need not be read.
#
# An ABORT may come when its flow has been polled and its slot given away, even to another
# worker. So the state is read first: if that other one has made it OPEN, then its generation
# has risen, and the release of the one shows the other.
cdef void worker_run_inbox(Worker* w) noexcept nogil:
    cdef uint64_t order = 0
    cdef uint32_t slot
    cdef uint32_t kind
    cdef uint32_t state
    cdef Flow* flow
    exchange32(&w.wake_rung, 0)
    while ring_get(&w.inbox, &order):
        slot = (<uint32_t>order) >> ORDER_BITS
        kind = <uint32_t>order & ((1 << ORDER_BITS) - 1)
        flow = &w.core.flows[slot]
        state = load_acquire32(&flow.state)
        if load_relaxed32(&flow.generation) != <uint32_t>(order >> 32):
            add_own64(&w.counters.stale_events, 1)
        elif kind == ORDER_ADMIT:
            flow_admit(w, flow, slot)
        elif state != FLOW_OPEN:
            continue
        elif kind == ORDER_ABORT:
            flow_bury(w, flow, slot, R_ABORTED, 0, 0)
        elif kind == ORDER_TOUCH:
            udp_touch(w, flow, slot)
        else:
            pulse_doubt(w, flow, slot)


# One turn for every flow that was ready when the round began; who has budget left over
# work stands at the tail again and meets fresh events first. The worker that has the
# handshakes stops after a few: a crowd of them must not keep an abort waiting.
cdef void worker_run_ready(Worker* w) noexcept nogil:
    cdef uint32_t left = min(w.ready.count, w.round_turns)
    cdef uint32_t slot
    cdef Flow* flow
    if left:
        pulse_want(w)
    while left and w.ready.count:
        left -= 1
        slot = w.ready.first
        flow = &w.core.flows[slot]
        list_remove(w.core.flows, &w.ready, LINK_READY, slot)
        flow.is_ready = 0
        flow.is_calm = 0
        add_own64(&w.counters.turns, 1)
        if flow_turn(w, flow, slot):
            flow_want_turn(w, flow, slot)


# Hand the dead of this round to the control plane; one bell for all of them, and for newcomers.
cdef void worker_publish(Worker* w) noexcept nogil:
    cdef uint32_t slot
    cdef Flow* flow
    if w.grave.count == 0 and not w.must_ring:
        return
    w.must_ring = 0
    while w.grave.count:
        slot = w.grave.first
        flow = &w.core.flows[slot]
        list_remove(w.core.flows, &w.grave, LINK_READY, slot)
        flow_move(w, flow, FLOW_DONE)
        NP_BUG(not ring_put(&w.outbox, slot), &w.counters.bugs, b"outbox full")
    NP_BUG(ring_bell(&w.core.notify_rung, w.core.notify) < 0, &w.counters.bugs,
           b"completion bell failed")


# The last round: take what is still in the inbox, end every flow, close what is ours.
cdef void worker_leave(Worker* w) noexcept nogil:
    worker_run_inbox(w)
    while w.all.count:
        flow_bury(w, &w.core.flows[w.all.first], w.all.first, R_ABORTED, 0, 0)
    worker_publish(w)
    pipe_close_all(w)
    NP_BUG(sys_close(w.epoll) < 0, &w.counters.bugs, b"closing the epoll set failed")
    w.epoll = -1
    publish_release32(&w.exited, 1)


# The worker with the fewest flows.
cdef Worker* worker_choose(Core* core) noexcept nogil:
    cdef Worker* w = &core.workers[0]
    cdef uint32_t i
    for i in range(1, core.threads):
        if core.workers[i].load < w.load:
            w = &core.workers[i]
    return w


# Tell a worker to leave. Rung without the flag: this must get through whatever it says.
cdef void worker_stop(Worker* w) noexcept nogil:
    if w.is_started and not w.is_joined:
        publish_release32(&w.stop, 1)
        sys_ring(w.wake)


# -> how many threads are still running. A worker that has said goodbye is only a return away
# from its end, so the join does not block.
cdef uint32_t worker_join_all(Core* core) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t left = 0
    cdef Worker* w
    for i in range(core.crew):
        w = &core.workers[i]
        if w.is_started and not w.is_joined:
            if load_acquire32(&w.exited):
                pthread_join(w.thread, NULL)
                w.is_joined = 1
            else:
                left += 1
    return left


# Add one worker's counters to a sum; every field is a uint64_t.
cdef void worker_add_counters(Counters* total, Counters* part) noexcept nogil:
    cdef uint64_t* into = <uint64_t*>total
    cdef uint64_t* source = <uint64_t*>part
    cdef size_t i
    for i in range(sizeof(Counters) // sizeof(uint64_t)):
        into[i] += load_relaxed64(&source[i])
