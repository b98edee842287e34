#include "huffman_kernels.inl"

namespace hflfnerv {

const HuffmanKernels kHuffmanKernelsScalar = {
    decode_chunks8<Rows>,        decode_chunks<Symbol16>,      decode_prefix<Symbol8>, decode_prefix<Symbol16>,
    encode_chunks<std::uint8_t>, encode_chunks<std::uint16_t>, count_symbols8,         copy_bytes,
};

}  // namespace hflfnerv
