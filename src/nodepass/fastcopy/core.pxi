# The tables of the engine: mapped once at Engine(), given back when the last thread has gone.
# Beside this file only gates and heads allocate.

cdef enum:
    MAX_LENT = 16384            # peers without a link, of all gates: 32 gates of the usual 512


# -> the sizes of everything mapped for `threads` workers and `capacity` flows.
cdef inline Size core_sizes(uint32_t threads, uint32_t capacity) noexcept nogil:
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
    cdef Size size = core_sizes(threads, capacity)
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
            rc = core_map_worker(w, &size)
            if rc < 0:
                break
    if rc < 0:
        core_unmap(core)
        return rc
    result[0] = core
    return 0


# -> 0 or -errno; what was mapped is found again by core_unmap().
cdef int core_map_worker(Worker* w, Size* size) noexcept nogil:
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
    cdef Size size = core_sizes(core.threads, core.capacity)
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
