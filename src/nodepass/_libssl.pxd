# What the workers call of OpenSSL: pointers into the one copy that lives inside `cryptography`,
# in the order of ENTRY_POINTS in _openssl.py, which finds them. Declarations only: nothing is
# linked and no header is needed. Everything here is called without the GIL.
#
# SSL and BIO are never looked into, hence void*. Prototypes: man SSL_read(3) and so on.

ctypedef int (*SslCall)(void* ssl) noexcept nogil
ctypedef int (*SslRead)(void* ssl, void* into, int room) noexcept nogil
ctypedef int (*SslWrite)(void* ssl, const void* data, int size) noexcept nogil
ctypedef int (*SslResult)(void* ssl, int result) noexcept nogil
ctypedef void (*SslSetBio)(void* ssl, void* bio_in, void* bio_out) noexcept nogil
ctypedef void* (*BioOver)(const void* data, int size) noexcept nogil
ctypedef long (*BioOption)(void* bio, int value) noexcept nogil
ctypedef int (*BioRead)(void* bio, void* into, int room) noexcept nogil
ctypedef int (*BioWrite)(void* bio, const void* data, int size) noexcept nogil
ctypedef int (*BioCall)(void* bio) noexcept nogil
ctypedef void* (*BioNew)(void* kind) noexcept nogil
ctypedef void* (*BioKind)() noexcept nogil
ctypedef void (*ErrorsClear)() noexcept nogil
ctypedef unsigned long (*ErrorsPeek)() noexcept nogil

cdef struct OpenSsl:
    SslCall handshake           # SSL_do_handshake
    SslRead read                # SSL_read
    SslWrite write              # SSL_write
    SslCall shutdown            # SSL_shutdown
    SslResult result            # SSL_get_error
    SslSetBio set_bio           # SSL_set_bio
    BioOver bio_over            # BIO_new_mem_buf
    BioOption bio_at_end        # BIO_set_mem_eof_return
    BioRead bio_read            # BIO_read
    BioWrite bio_write          # BIO_write
    BioCall bio_free            # BIO_free
    ErrorsClear errors_clear    # ERR_clear_error
    ErrorsPeek errors_peek      # ERR_peek_error
    BioNew bio_new              # BIO_new
    BioKind bio_memory          # BIO_s_mem

cdef enum:                      # what SSL_get_error() says
    SSL_WANTS_READ = 2
    SSL_PEER_ENDED = 6          # SSL_ERROR_ZERO_RETURN: close_notify

cdef enum:                      # what an ALPN callback may say
    SSL_ALPN_CHOSEN = 0
    SSL_ALPN_ALERT = 2          # fatal: no_application_protocol
