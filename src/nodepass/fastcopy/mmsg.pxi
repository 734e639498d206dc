# Batches of datagrams: one system call for up to 64, and what comes with each of them.
#
# All fields that the kernel writes back (name and control lengths, flags) are set again before
# each call. Runs on: the worker.

cdef enum:
    FRAME_HEAD = 2              # bytes: the length in front of each datagram on a link
    MAX_DATAGRAM = 65535        # what it can say
    MAIL_ERRORS = 8             # in a row; whoever sends more delays what he sends behind them
    MAIL_CELLS = 18             # what the largest datagram needs, wherever its queue ends
    GSO_SEGMENTS = 64           # UDP_MAX_SEGMENTS of kernels before 6.9
    GSO_BYTES = 65000           # below what an IP packet holds


# Lay the pointers once; they stay.
cdef void mmsg_prepare(Worker* w) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef int i
    for i in range(MAIL_BATCH):
        mail.rooms[i].iov_base = w.mailbags + <size_t>i * MAIL_STRIDE
        mail.rooms[i].iov_len = MAIL_ROOM
        mail.incoming[i].msg_hdr.msg_name = &mail.names[i]
        mail.incoming[i].msg_hdr.msg_iov = &mail.rooms[i]
        mail.incoming[i].msg_hdr.msg_iovlen = 1
        mail.incoming[i].msg_hdr.msg_control = &mail.controls[i][0]
    mail.used = MAIL_BATCH
    mail.is_ready = 1


# -> datagrams received, 0 if none waits, -errno. Each is in its mailbag; see mmsg_open().
cdef int mmsg_receive(Worker* w, int fd) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef uint32_t i
    cdef int n
    if not mail.is_ready:
        mmsg_prepare(w)
    for i in range(mail.used):
        mail.incoming[i].msg_hdr.msg_namelen = sizeof(sockaddr_in6)
        mail.incoming[i].msg_hdr.msg_controllen = MAIL_CONTROL * sizeof(uint64_t)
        mail.incoming[i].msg_hdr.msg_flags = 0
    n = sys_recvmmsg(fd, mail.incoming, MAIL_BATCH)
    mail.used = <uint32_t>max(n, 0)
    return 0 if n == -EAGAIN else n


# The same, past errors: each stands in front of the datagrams and is gone once it has been read.
# (ICMP tells of them: too large for the path, prohibited, no route.) -> datagrams, 0 none,
# -ECONNREFUSED.
cdef int mmsg_receive_past_errors(Worker* w, int fd) noexcept nogil:
    cdef int tries
    cdef int n = 0
    for tries in range(MAIL_ERRORS):
        n = mmsg_receive(w, fd)
        if n >= 0 or n == -ECONNREFUSED:
            return n
    return 0


# Read what came beside datagram `i`: keys[i].local, segments[i], and the count of those that the
# kernel has dropped so far (left alone if it says nothing).
cdef void mmsg_open(Worker* w, uint32_t i, uint32_t* lost) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef msghdr* header = &mail.incoming[i].msg_hdr
    cdef cmsghdr* part = CMSG_FIRSTHDR(header)
    cdef in_pktinfo inet
    cdef in6_pktinfo inet6
    cdef int value = 0
    mail.segments[i] = 0
    while part != NULL:
        if part.cmsg_level == SOL_UDP and part.cmsg_type == UDP_GRO:
            memcpy(&value, CMSG_DATA(part), sizeof(value))
            if 0 < value and <unsigned int>value < mail.incoming[i].msg_len:
                mail.segments[i] = <uint32_t>value
        elif part.cmsg_level == SOL_SOCKET and part.cmsg_type == SO_RXQ_OVFL:
            memcpy(lost, CMSG_DATA(part), sizeof(uint32_t))
        elif part.cmsg_level == IPPROTO_IP and part.cmsg_type == IP_PKTINFO:
            memcpy(&inet, CMSG_DATA(part), sizeof(inet))
            mmsg_map_key(&mail.keys[i].local[0], &inet.ipi_spec_dst)
        elif part.cmsg_level == IPPROTO_IPV6 and part.cmsg_type == IPV6_PKTINFO:
            memcpy(&inet6, CMSG_DATA(part), sizeof(inet6))
            if inet6.ipi6_addr.s6_addr[0] != 0xFF:      # nobody answers from a multicast address
                memcpy(&mail.keys[i].local[0], &inet6.ipi6_addr, 16)
        part = CMSG_NXTHDR(header, part)


# An IPv4 address as IPv6 writes it: RFC 4291, section 2.5.5.2.
cdef inline void mmsg_map_key(uint8_t* into, const in_addr* address) noexcept nogil:
    memset(into, 0, 10)
    into[10] = 0xFF
    into[11] = 0xFF
    memcpy(into + 12, address, 4)


# Who sent datagram `i`.
cdef inline void mmsg_source(Worker* w, uint32_t i) noexcept nogil:
    cdef Key* key = &w.mail.keys[i]
    cdef sockaddr_in6* name = &w.mail.names[i]
    memset(key, 0, sizeof(Key))
    if name.sin6_family == AF_INET:
        key.port = (<sockaddr_in*>name).sin_port
        mmsg_map_key(&key.source[0], &(<sockaddr_in*>name).sin_addr)
        return
    key.port = name.sin6_port
    key.scope = name.sin6_scope_id
    memcpy(&key.source[0], &name.sin6_addr, 16)


# Address all outgoing messages to a peer of a gate. A connected socket needs no name.
cdef void mmsg_address(Worker* w, Udp* udp, Gate* gate) noexcept nogil:
    cdef sockaddr_in6* name = &w.mail.name
    memset(name, 0, sizeof(sockaddr_in6))
    if gate.is_inet:
        name.sin6_family = AF_INET
        (<sockaddr_in*>name).sin_port = udp.key.port
        memcpy(&(<sockaddr_in*>name).sin_addr, &udp.key.source[12], 4)
        return
    name.sin6_family = AF_INET6
    name.sin6_port = udp.key.port
    name.sin6_scope_id = udp.key.scope
    memcpy(&name.sin6_addr, &udp.key.source[0], 16)


# Begin outgoing message `i`, without datagrams yet.
cdef inline void mmsg_begin(Worker* w, uint32_t i, iovec* pieces, Gate* gate) noexcept nogil:
    cdef msghdr* header = &w.mail.outgoing[i].msg_hdr
    header.msg_name = NULL
    header.msg_namelen = 0
    if gate != NULL:
        header.msg_name = &w.mail.name
        header.msg_namelen = sizeof(sockaddr_in) if gate.is_inet else sizeof(sockaddr_in6)
    header.msg_iov = pieces
    header.msg_iovlen = 0
    header.msg_control = NULL
    header.msg_controllen = 0
    header.msg_flags = 0
    w.mail.frames[i] = 0


# Finish outgoing message `i`: its source address and, for a run of datagrams, their size.
cdef void mmsg_seal(Worker* w, uint32_t i, Udp* udp, Gate* gate, uint32_t segment) noexcept nogil:
    cdef Mail* mail = w.mail
    cdef msghdr* header = &mail.outgoing[i].msg_hdr
    cdef cmsghdr* part
    cdef in_pktinfo inet
    cdef in6_pktinfo inet6
    cdef uint16_t size = <uint16_t>segment
    cdef bint is_run = mail.frames[i] > 1
    if not udp.has_local and not is_run:
        return
    memset(&mail.control[i][0], 0, MAIL_CONTROL * sizeof(uint64_t))
    header.msg_control = &mail.control[i][0]
    header.msg_controllen = MAIL_CONTROL * sizeof(uint64_t)
    part = CMSG_FIRSTHDR(header)
    header.msg_controllen = 0
    if udp.has_local and gate.is_inet:
        memset(&inet, 0, sizeof(inet))
        memcpy(&inet.ipi_spec_dst, &udp.key.local[12], 4)
        part.cmsg_level = IPPROTO_IP
        part.cmsg_type = IP_PKTINFO
        part.cmsg_len = CMSG_LEN(sizeof(inet))
        memcpy(CMSG_DATA(part), &inet, sizeof(inet))
        header.msg_controllen = CMSG_SPACE(sizeof(inet))
    elif udp.has_local:
        memset(&inet6, 0, sizeof(inet6))
        memcpy(&inet6.ipi6_addr, &udp.key.local[0], 16)
        inet6.ipi6_ifindex = udp.key.scope
        part.cmsg_level = IPPROTO_IPV6
        part.cmsg_type = IPV6_PKTINFO
        part.cmsg_len = CMSG_LEN(sizeof(inet6))
        memcpy(CMSG_DATA(part), &inet6, sizeof(inet6))
        header.msg_controllen = CMSG_SPACE(sizeof(inet6))
    if is_run:
        part = <cmsghdr*>(<char*>part + header.msg_controllen)
        part.cmsg_level = SOL_UDP
        part.cmsg_type = UDP_SEGMENT
        part.cmsg_len = CMSG_LEN(sizeof(size))
        memcpy(CMSG_DATA(part), &size, sizeof(size))
        header.msg_controllen += CMSG_SPACE(sizeof(size))


# -> payload bytes of outgoing message `i`.
cdef inline size_t mmsg_bytes(Worker* w, uint32_t i) noexcept nogil:
    cdef size_t size = 0
    cdef size_t k
    for k in range(w.mail.frames[i]):
        size += w.mail.outgoing[i].msg_hdr.msg_iov[k].iov_len
    return size


# -> datagrams in mailbag `i`.
cdef inline uint64_t mmsg_count(Worker* w, uint32_t i) noexcept nogil:
    cdef uint32_t segment = w.mail.segments[i]
    return (w.mail.incoming[i].msg_len + segment - 1) // segment if segment else 1


cdef inline bint mmsg_is_large(Worker* w, uint32_t i, uint32_t limit) noexcept nogil:
    cdef uint32_t size = w.mail.segments[i]
    if size == 0:
        size = w.mail.incoming[i].msg_len
    return size > limit or w.mail.incoming[i].msg_hdr.msg_flags & MSG_TRUNC
