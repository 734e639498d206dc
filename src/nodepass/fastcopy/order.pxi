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
    if flow.kind >= KIND_GATE or flow.legs[1 - index].tls != NULL:
        way.head = head
        way.head_to = size
    else:
        way.parked = head
        way.parked_to = size
    return 0


# Undo flow_prepare(), flow_secure() and flow_park_head() of a flow that was never handed over.
cdef void flow_undo(Flow* flow) noexcept nogil:
    cdef int i
    for i in range(2):
        head_give(flow.ways[i].parked)
        head_give(flow.ways[i].head)
        flow.ways[i].parked = NULL
        flow.ways[i].head = NULL
        flow.legs[i].tls = NULL
    store_relaxed32(&flow.state, FLOW_FREE)


# The worker with the fewest flows.
cdef Worker* worker_choose(Core* core) noexcept nogil:
    cdef Worker* w = &core.workers[0]
    cdef uint32_t i
    for i in range(1, core.threads):
        if core.workers[i].load < w.load:
            w = &core.workers[i]
    return w


# Make the Udp of a slot ready, beside flow_prepare().
cdef void udp_prepare(Udp* udp, uint32_t limit) noexcept nogil:
    memset(udp, 0, sizeof(Udp))
    udp.gate = NONE_SLOT
    udp.limit = limit
    udp.batch_first = NONE_SLOT
    queue_clear(&udp.queue)
    queue_clear(&udp.rest)


# Ask something of a UDP flow. The bits are set before the order is put; while one is on its way
# no other is needed.
cdef void udp_wish(Worker* w, Flow* flow, Udp* udp, uint32_t slot, uint32_t bit) noexcept nogil:
    if not or32(&udp.wishes, bit):
        order_put(w, flow, slot, ORDER_TOUCH)


# -> 1 the gate that a peer was made for still has its slot: the next gate may have it by now.
cdef inline bint gate_is(Core* core, Udp* udp) noexcept nogil:
    return load_relaxed32(&core.flows[udp.gate].generation) == udp.gate_generation


# Lend a gate room for one more peer. -> 1, 0 no slot is left.
cdef int gate_lend(Core* core, uint32_t gate) noexcept nogil:
    cdef Udp* own = &core.udps[gate]
    cdef uint32_t worker = core.flows[gate].worker
    cdef uint32_t slot = slot_take(core, 1)
    cdef Udp* udp
    if slot == NONE_SLOT:
        return 0
    flow_prepare(&core.flows[slot], -1, -1, worker, 0)
    core.flows[slot].kind = KIND_PEER
    udp = &core.udps[slot]
    udp_prepare(udp, own.limit)
    udp.gate = gate
    udp.gate_generation = load_relaxed32(&core.flows[gate].generation)
    own.own.lent += 1
    core.lent += 1
    order_put(&core.workers[worker], &core.flows[slot], slot, ORDER_ADMIT)
    return 1


# -> 0 or -errno. Ask for what comes beside datagrams. What a kernel does not have is done without.
cdef int gate_set_up(int fd, Gate* gate) noexcept nogil:
    cdef sockaddr_in6 name
    cdef uint8_t zero[16]
    cdef int rc = sys_own_name(fd, &name)
    memset(zero, 0, sizeof(zero))
    if rc < 0:
        return rc
    if name.sin6_family == AF_INET:
        gate.is_inet = 1
        gate.is_wildcard = (<sockaddr_in*>&name).sin_addr.s_addr == 0
        if gate.is_wildcard:
            rc = sys_set(fd, IPPROTO_IP, IP_PKTINFO, 1)
    elif name.sin6_family == AF_INET6:
        gate.is_wildcard = memcmp(&name.sin6_addr, zero, sizeof(zero)) == 0
        if gate.is_wildcard:
            rc = sys_set(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
    else:
        return -EAFNOSUPPORT
    return rc


# Switch on what makes batches larger and losses visible; without any of it all works, too.
cdef void udp_set_up(int fd) noexcept nogil:
    cdef int rc = sys_set(fd, SOL_UDP, UDP_GRO, 1)          # Linux 5.0
    rc = sys_set(fd, SOL_SOCKET, SO_RXQ_OVFL, 1) if rc <= 0 else rc


# -> 1 the kernel can cut runs of datagrams for this socket (Linux 4.18).
cdef inline bint udp_has_gso(int fd) noexcept nogil:
    return sys_get(fd, SOL_UDP, UDP_SEGMENT) >= 0


# Hand an order over. After ADMIT the flow is the worker's.
cdef void order_put(Worker* w, Flow* flow, uint32_t slot, int kind) noexcept nogil:
    cdef uint64_t order = (<uint64_t>load_relaxed32(&flow.generation) << 32) | (
        (slot << ORDER_BITS) | <uint32_t>kind
    )
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
