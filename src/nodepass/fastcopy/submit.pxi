# The control plane's side of a flow and of a worker: called by the methods of Engine, with the
# GIL held, on the asyncio thread. Plain structs only, and nothing here blocks.


# Make a slot ready for admission. Its two descriptors are still the caller's. Generation and
# state stay atomic: a stale ABORT of the slot's last life may be looking at them.
cdef void submit_prepare(
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
cdef void submit_secure(Flow* flow, int side, Handles* handles) noexcept nogil:
    cdef Leg* leg = &flow.legs[side]
    leg.tls = handles.ssl
    leg.tls_in = handles.bio_in
    leg.tls_out = handles.bio_out
    leg.bits = TLS_HOLDS | TLS_OWES
    flow.ways[0].is_tls = 1
    flow.ways[1].is_tls = 1


# -> 0 or -ENOMEM. Bytes read before admission are parked from the start, or wait to be sealed.
cdef int submit_park_head(Flow* flow, int index, const char* data, size_t size) noexcept nogil:
    cdef Way* way = &flow.ways[index]
    cdef char* head
    if size == 0:
        return 0
    head = head_take(data, size, 0)
    if head == NULL:
        return -ENOMEM
    if flow_is_udp(flow) or flow.legs[1 - index].tls != NULL:
        way.head = head
        way.head_to = size
    else:
        way.parked = head
        way.parked_to = size
    return 0


# Undo submit_prepare(), submit_secure() and submit_park_head() of a flow that was never handed
# over.
cdef void submit_undo(Flow* flow) noexcept nogil:
    cdef int i
    for i in range(2):
        head_give(flow.ways[i].parked)
        head_give(flow.ways[i].head)
        flow.ways[i].parked = NULL
        flow.ways[i].head = NULL
        flow.legs[i].tls = NULL
    store_relaxed32(&flow.state, FLOW_FREE)


# Make the Udp of a slot ready, beside submit_prepare().
cdef void submit_prepare_udp(Udp* udp, uint32_t limit) noexcept nogil:
    memset(udp, 0, sizeof(Udp))
    udp.gate = NONE_SLOT
    udp.limit = limit
    udp.batch_first = NONE_SLOT
    queue_clear(&udp.queue)
    queue_clear(&udp.rest)


# Ask something of a UDP flow. The bits are set before the order is put; while one is on its way
# no other is needed.
cdef void submit_wish(Worker* w, Flow* flow, Udp* udp, uint32_t slot, uint32_t bit) noexcept nogil:
    if not or32(&udp.wishes, bit):
        submit_order(w, flow, slot, ORDER_TOUCH)


# -> 1 the gate that a peer was made for still has its slot: the next gate may have it by now.
cdef inline bint submit_is_same_gate(Core* core, Udp* udp) noexcept nogil:
    return load_relaxed32(&core.flows[udp.gate].generation) == udp.gate_generation


# Lend a gate room for one more peer. -> 1, 0 no slot is left.
cdef int submit_lend_peer(Core* core, uint32_t gate) noexcept nogil:
    cdef Udp* own = &core.udps[gate]
    cdef uint32_t worker = core.flows[gate].worker
    cdef uint32_t slot = slot_take(core, 1)
    cdef Udp* udp
    if slot == NONE_SLOT:
        return 0
    submit_prepare(&core.flows[slot], -1, -1, worker, 0)
    core.flows[slot].kind = KIND_PEER
    udp = &core.udps[slot]
    submit_prepare_udp(udp, own.limit)
    udp.gate = gate
    udp.gate_generation = load_relaxed32(&core.flows[gate].generation)
    own.own.lent += 1
    core.lent += 1
    submit_order(&core.workers[worker], &core.flows[slot], slot, ORDER_ADMIT)
    return 1


# -> 0 or -errno. Ask for what comes beside datagrams. What a kernel does not have is done without.
cdef int submit_set_up_gate(int fd, Gate* gate) noexcept nogil:
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
cdef void submit_set_up_udp(int fd) noexcept nogil:
    cdef int rc = sys_set(fd, SOL_UDP, UDP_GRO, 1)          # Linux 5.0
    rc = sys_set(fd, SOL_SOCKET, SO_RXQ_OVFL, 1) if rc <= 0 else rc


# -> 1 the kernel can cut runs of datagrams for this socket (Linux 4.18).
cdef inline bint submit_has_gso(int fd) noexcept nogil:
    return sys_get(fd, SOL_UDP, UDP_SEGMENT) >= 0


# Hand an order over. After ADMIT the flow is the worker's.
cdef void submit_order(Worker* w, Flow* flow, uint32_t slot, int kind) noexcept nogil:
    cdef uint64_t order = (<uint64_t>load_relaxed32(&flow.generation) << 32) | (
        (slot << ORDER_BITS) | <uint32_t>kind
    )
    NP_BUG(not ring_put(&w.inbox, order), &w.counters.bugs, b"inbox full")
    NP_BUG(ring_bell(&w.wake_rung, w.wake) < 0, &w.counters.bugs, b"wake bell failed")
