# Intrusive lists that thread flows together: a flow is on a list of each kind at most once.


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
