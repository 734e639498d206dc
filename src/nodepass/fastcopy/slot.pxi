# Flow slots: a name is a slot and its generation. Runs on: control plane.


# -> a free slot, NONE_SLOT if every flow, or all room for peers, is in use. Slots used before
# come first: they are resident already.
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
# on. 31 bits: a token stays below 2**63. Runs after poll().
cdef void slot_give(Core* core, uint32_t slot) noexcept nogil:
    cdef Flow* flow = &core.flows[slot]
    cdef uint32_t generation = (load_relaxed32(&flow.generation) + 1) & 0x7FFFFFFF
    store_relaxed32(&flow.generation, generation if generation else 1)
    core.free_slots[core.free_count] = slot
    core.free_count += 1
    core.open_count -= 1
