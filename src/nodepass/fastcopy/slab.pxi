# All memory of the engine: tables mapped once at Engine(), flow slots, parked-byte buffers,
# heads, and the intrusive lists that thread flows together. The only file that allocates.

cdef enum:
    # One recv. Two relays in a row, bulk, copying: CPU seconds per GB at 128 KiB 0.77,
    # 256 KiB 0.65, 512 KiB 0.60, 1 MiB 0.59; throughput best at 512 KiB. docs/engine.md.
    BUFFER_BYTES = 524288
    MAX_TAKEN = 1 << 20         # descriptors that are looked after: the kernel's fs.nr_open
    MAX_LENT = 16384            # peers without a link, of all gates: 32 gates of the usual 512
    WARM_BUFFERS = 4            # per worker; free buffers that may stay resident (2 MiB)


# -> the sizes of everything mapped for `threads` workers and `capacity` flows.
cdef inline Size slab_sizes(uint32_t threads, uint32_t capacity) noexcept nogil:
    cdef Size size
    cdef size_t cells = 1
    while cells < capacity:
        cells *= 2
    size.flows = capacity * sizeof(Flow)
    size.free_slots = capacity * sizeof(uint32_t)
    size.workers = (threads + 1) * sizeof(Worker)
    size.inbox = cells * INBOX_PER_FLOW * sizeof(uint64_t)
    size.outbox = cells * OUTBOX_PER_FLOW * sizeof(uint64_t)
    size.buffers = <size_t>MAX_BUFFERS * BUFFER_BYTES
    size.udps = capacity * sizeof(Udp)
    size.cells = <size_t>MAX_CELLS * CELL_BYTES
    size.cell_links = <size_t>MAX_CELLS * sizeof(uint32_t)
    size.mailbags = <size_t>MAIL_BATCH * MAIL_STRIDE
    size.mail = sizeof(Mail)
    size.taken = MAX_TAKEN * sizeof(uint32_t)
    return size


# -> 0 and *result with every table mapped and no fd open, -errno and nothing kept otherwise.
# Runs on: control plane.
cdef int core_open(uint32_t threads, uint32_t flows, Core** result) noexcept nogil:
    cdef uint32_t capacity = flows + MAX_LENT
    cdef Size size = slab_sizes(threads, capacity)
    cdef Core* core = <Core*>calloc(1, sizeof(Core))
    cdef Worker* w
    cdef uint32_t i
    cdef int rc = 0
    result[0] = NULL
    if core == NULL:
        return -ENOMEM
    core.references = 1
    core.threads = threads
    core.crew = threads + 1
    core.capacity = capacity
    core.flow_limit = flows
    core.notify = -1
    core.done = -1
    rc = sys_map(size.workers, <void**>&core.workers)
    if rc == 0:
        rc = sys_map(size.flows, <void**>&core.flows)
    if rc == 0:
        rc = sys_map(size.udps, <void**>&core.udps)
    if rc == 0:
        rc = sys_map(size.free_slots, <void**>&core.free_slots)
    if rc == 0:
        rc = sys_map(size.taken, <void**>&core.taken)
    if rc == 0:
        for i in range(core.crew):
            w = &core.workers[i]
            w.core = core
            w.index = i
            w.epoll = -1
            w.wake = -1
            w.round_turns = HANDSHAKE_TURNS if i == threads else NONE_SLOT
            rc = worker_map(w, &size)
            if rc < 0:
                break
    if rc < 0:
        core_unmap(core)
        return rc
    result[0] = core
    return 0


# -> 0 or -errno; what was mapped is found again by core_unmap().
cdef int worker_map(Worker* w, Size* size) noexcept nogil:
    cdef int rc = sys_map(size.inbox, <void**>&w.inbox.cells)
    if rc == 0:
        rc = sys_map(size.outbox, <void**>&w.outbox.cells)
    if rc == 0:
        rc = sys_map(size.buffers, <void**>&w.buffers)
    if rc == 0:
        rc = sys_map(size.cells, <void**>&w.cells)
    if rc == 0:
        rc = sys_map(size.cell_links, <void**>&w.cell_next)
    if rc == 0:
        rc = sys_map(size.cell_links, <void**>&w.cell_stack)
    if rc == 0:
        rc = sys_map(size.mailbags, <void**>&w.mailbags)
    if rc == 0:
        rc = sys_map(size.mail, <void**>&w.mail)
    if rc < 0:
        return rc
    w.inbox.mask = size.inbox // sizeof(uint64_t) - 1
    w.outbox.mask = size.outbox // sizeof(uint64_t) - 1
    w.free_buffers = 0
    cdef int32_t i
    for i in range(MAX_BUFFERS):
        w.buffer_stack[i] = MAX_BUFFERS - 1 - i     # lowest addresses are taken first
    w.free_buffers = MAX_BUFFERS
    w.scratch_index = buffer_take(w)
    w.scratch = buffer_at(w, w.scratch_index)
    list_clear(&w.all)
    list_clear(&w.ready)
    list_clear(&w.grave)
    for i in range(WHEEL_BUCKETS):
        list_clear(&w.wheel[i])
    return 0


# Give every table back. Frees memory only: fds are closed by their owners before.
cdef void core_unmap(Core* core) noexcept nogil:
    cdef Size size = slab_sizes(core.threads, core.capacity)
    cdef Worker* w
    cdef uint32_t i
    if core.workers != NULL:
        for i in range(core.crew):
            w = &core.workers[i]
            if w.inbox.cells != NULL:
                sys_unmap(w.inbox.cells, size.inbox)
            if w.outbox.cells != NULL:
                sys_unmap(w.outbox.cells, size.outbox)
            if w.buffers != NULL:
                sys_unmap(w.buffers, size.buffers)
            if w.cells != NULL:
                sys_unmap(w.cells, size.cells)
            if w.cell_next != NULL:
                sys_unmap(w.cell_next, size.cell_links)
            if w.cell_stack != NULL:
                sys_unmap(w.cell_stack, size.cell_links)
            if w.mailbags != NULL:
                sys_unmap(w.mailbags, size.mailbags)
            if w.mail != NULL:
                sys_unmap(w.mail, size.mail)
        sys_unmap(core.workers, size.workers)
    if core.udps != NULL:
        for i in range(core.fresh):
            gate_free(&core.udps[i])
        sys_unmap(core.udps, size.udps)
    if core.flows != NULL:
        sys_unmap(core.flows, size.flows)
    if core.free_slots != NULL:
        sys_unmap(core.free_slots, size.free_slots)
    if core.taken != NULL:
        sys_unmap(core.taken, size.taken)
    free(core)


# Drop one reference; the last one out closes the event fds and frees the tables.
# Runs on: control plane and workers (as their last act).
cdef void core_release(Core* core) noexcept nogil:
    if subtract32(&core.references, 1) == 0:
        core_close_events(core)
        core_unmap(core)


# Close the event fds. Only when no worker is left to ring them.
cdef void core_close_events(Core* core) noexcept nogil:
    cdef uint32_t i
    for i in range(core.crew):
        if core.workers[i].wake >= 0:
            sys_close(core.workers[i].wake)
            core.workers[i].wake = -1
    if core.notify >= 0:
        sys_close(core.notify)
        core.notify = -1
    if core.done >= 0:
        sys_close(core.done)
        core.done = -1


# -> a free slot, NONE_SLOT if every flow, or all room for peers, is in use. Slots used before
# come first: they are resident already. Runs on: control plane.
cdef uint32_t slot_take(Core* core, bint is_peer) noexcept nogil:
    cdef uint32_t slot
    if is_peer and core.lent == MAX_LENT:
        return NONE_SLOT
    if not is_peer and core.open_count - core.lent == core.flow_limit:
        return NONE_SLOT
    if core.free_count:
        core.free_count -= 1
        slot = core.free_slots[core.free_count]
    elif core.fresh < core.capacity:
        slot = core.fresh
        core.fresh += 1
        store_relaxed32(&core.flows[slot].generation, 1)
    else:
        return NONE_SLOT
    core.open_count += 1
    return slot


# The generation rises, so that every tag and token of the old life is a stranger from now
# on. 31 bits: a token stays below 2**63. Runs on: control plane, after poll().
cdef void slot_give(Core* core, uint32_t slot) noexcept nogil:
    cdef Flow* flow = &core.flows[slot]
    cdef uint32_t generation = (load_relaxed32(&flow.generation) + 1) & 0x7FFFFFFF
    store_relaxed32(&flow.generation, generation if generation else 1)
    core.free_slots[core.free_count] = slot
    core.free_count += 1
    core.open_count -= 1


# Note that a descriptor is the engine's, or no more. A page of the table has room for 1024.
# Runs on: control plane, before a flow is handed over; the worker, before it closes.
cdef inline void mark_taken(Core* core, int fd, uint32_t is_ours) noexcept nogil:
    if 0 <= fd < MAX_TAKEN:
        publish_release32(&core.taken[fd], is_ours)


# -> 1 a descriptor is the engine's already: whoever hands it over once more has lost count.
cdef inline bint is_taken(Core* core, int fd) noexcept nogil:
    return 0 <= fd < MAX_TAKEN and load_acquire32(&core.taken[fd])


# -> 0 and udp.own, or -errno. Runs on: control plane.
cdef int gate_make(Udp* udp, uint64_t seed) noexcept nogil:
    cdef void* where = NULL
    cdef int rc = sys_map(sizeof(Gate) + GATE_BUCKETS * sizeof(uint32_t), &where)
    if rc < 0:
        return rc
    udp.own = <Gate*>where
    udp.own.buckets = <uint32_t*>(<char*>where + sizeof(Gate))
    udp.own.seed = seed
    list_clear(&udp.own.blocked)
    list_clear(&udp.own.young)
    list_clear(&udp.own.grown)
    return 0


# Of a gate that has ended, or never began; others have none. Runs on: control plane.
cdef void gate_free(Udp* udp) noexcept nogil:
    if udp.own != NULL:
        sys_unmap(udp.own, sizeof(Gate) + GATE_BUCKETS * sizeof(uint32_t))
        udp.own = NULL


cdef inline char* buffer_at(Worker* w, int32_t index) noexcept nogil:
    return w.buffers + <size_t>index * BUFFER_BYTES


# -> pool index, -1 if the pool is dry. Runs on: the worker.
cdef inline int32_t buffer_take(Worker* w) noexcept nogil:
    if w.free_buffers == 0:
        return -1
    w.free_buffers -= 1
    return w.buffer_stack[w.free_buffers]


# A buffer given back while many are free leaves memory: a burst of slow readers must not
# stay resident for ever. Runs on: the worker.
cdef inline void buffer_give(Worker* w, int32_t index) noexcept nogil:
    NP_BUG(w.free_buffers >= MAX_BUFFERS, &w.counters.bugs, b"buffer given twice")
    if w.counters.buffers_in_use > WARM_BUFFERS:
        sys_forget(buffer_at(w, index), BUFFER_BYTES)
    elif NP_DEBUG:
        memset(buffer_at(w, index), 0xDD, BUFFER_BYTES)
    w.buffer_stack[w.free_buffers] = index
    w.free_buffers += 1


# -> a copy of bytes with `spare` bytes of room behind them, NULL without memory. Owned by the
# flow; freed by head_give(). Runs on: control plane, for bytes that were read before
# admission; a worker whose pool is dry, for a TLS record that dst did not take.
cdef char* head_take(const char* data, size_t size, size_t spare) noexcept nogil:
    cdef char* head = <char*>malloc(size + spare)
    if head != NULL:
        memcpy(head, data, size)
    return head


cdef void head_give(char* head) noexcept nogil:
    free(head)


# Intrusive lists: a flow is on a list of each kind at most once.
cdef inline void list_clear(List* chain) noexcept nogil:
    chain.first = NONE_SLOT
    chain.last = NONE_SLOT
    chain.count = 0


cdef inline void list_append(Flow* flows, List* chain, int kind, uint32_t slot) noexcept nogil:
    cdef Link* link = &flows[slot].links[kind]
    link.next = NONE_SLOT
    link.prev = chain.last
    if chain.last == NONE_SLOT:
        chain.first = slot
    else:
        flows[chain.last].links[kind].next = slot
    chain.last = slot
    chain.count += 1


cdef inline void list_remove(Flow* flows, List* chain, int kind, uint32_t slot) noexcept nogil:
    cdef Link* link = &flows[slot].links[kind]
    if link.prev == NONE_SLOT:
        chain.first = link.next
    else:
        flows[link.prev].links[kind].next = link.next
    if link.next == NONE_SLOT:
        chain.last = link.prev
    else:
        flows[link.next].links[kind].prev = link.prev
    chain.count -= 1
