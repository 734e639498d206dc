# The control plane's side of a flow and of a worker: called by the methods of Engine, with the
# GIL held, on the asyncio thread. Plain structs only, and nothing here blocks.


cdef inline uint64_t token_of(Flow* flow, uint32_t slot) noexcept nogil:
    return (<uint64_t>load_relaxed32(&flow.generation) << 32) | slot


# Make a slot ready for admission. Its two descriptors are still the caller's. Generation and
# state stay atomic: a stale ABORT of the slot's last life may be looking at them.
cdef void flow_prepare(
    Flow* flow, int a, int b, uint32_t worker, uint32_t idle_ms
) noexcept nogil:
    cdef int i
    memset(&flow.worker, 0, sizeof(Flow) - (<char*>&flow.worker - <char*>flow))
    store_relaxed32(&flow.state, FLOW_QUEUED)
    flow.worker = worker
    flow.idle_ms = idle_ms
    flow.legs[0].fd = a
    flow.legs[1].fd = b
    for i in range(2):
        flow.ways[i].buffer = -1
        flow.ways[i].pipe_read = -1
        flow.ways[i].pipe_write = -1


# Make a leg speak TLS. Whatever its Connection has read and written so far comes first.
cdef void flow_secure(Flow* flow, int side, Handles* handles) noexcept nogil:
    cdef Leg* leg = &flow.legs[side]
    leg.tls = handles.ssl
    leg.tls_in = handles.bio_in
    leg.tls_out = handles.bio_out
    leg.bits = TLS_HOLDS | TLS_OWES
    flow.ways[0].is_tls = 1
    flow.ways[1].is_tls = 1


# -> 0 or -ENOMEM. Bytes read before admission are parked from the start, or wait to be sealed.
cdef int flow_park_head(Flow* flow, int index, const char* data, size_t size) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef char* head
    if size == 0:
        return 0
    head = head_take(data, size, 0)
    if head == NULL:
        return -ENOMEM
    if flow.legs[1 - index].tls != NULL:
        way.head = head
        way.head_to = size
    else:
        way.parked = head
        way.parked_to = size
    return 0


# Undo flow_prepare() and flow_park_head() of a flow that was never handed over.
cdef void flow_undo(Flow* flow) noexcept nogil:
    cdef int i
    for i in range(2):
        head_give(flow.ways[i].parked)
        head_give(flow.ways[i].head)
        flow.ways[i].parked = NULL
        flow.ways[i].head = NULL
    store_relaxed32(&flow.state, FLOW_FREE)


# Hand an order over. After ADMIT the flow is the worker's.
cdef void order_put(Worker* w, Flow* flow, uint32_t slot, int kind) noexcept nogil:
    cdef uint64_t order = (<uint64_t>load_relaxed32(&flow.generation) << 32) | (slot << 1) | kind
    NP_BUG(not ring_put(&w.inbox, order), &w.counters.bugs, b"inbox full")
    NP_BUG(ring_bell(&w.wake_rung, w.wake) < 0, &w.counters.bugs, b"wake bell failed")


# Tell a worker to leave. Rung without the flag: this must get through whatever it says.
cdef void worker_stop(Worker* w) noexcept nogil:
    if w.is_started and not w.is_joined:
        publish_release32(&w.stop, 1)
        sys_ring(w.wake)


# -> how many threads are still running. A worker that has said goodbye is only a return away
# from its end, so the join does not block.
cdef uint32_t workers_join(Core* core) noexcept nogil:
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
cdef void counters_add(Counters* total, Counters* part) noexcept nogil:
    cdef uint64_t* into = <uint64_t*>total
    cdef uint64_t* source = <uint64_t*>part
    cdef size_t i
    for i in range(sizeof(Counters) // sizeof(uint64_t)):
        into[i] += load_relaxed64(&source[i])
