// Tests of csrc/core without Python, meant to be built with -fsanitize=address,undefined (see csrc/Makefile).
#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "core/crc32.h"
#include "core/huffman.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;

std::vector<SimdLevel> levels() {
  std::vector<SimdLevel> all;
  for (int level = 0; level <= static_cast<int>(best_simd_level()); ++level)
    all.push_back(static_cast<SimdLevel>(level));
  return all;
}

template <class T>
std::vector<std::uint8_t> encode(const std::vector<T>& symbols, std::uint64_t chunk_symbols, SimdLevel level) {
  HuffmanEncoder encoder(level);
  encoder.add(sizeof(T) == 1 ? SymbolType::u8 : SymbolType::i16, {symbols.size()}, symbols.data(), 0);
  encoder.plan(false, chunk_symbols);
  const std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[encoder.bound()]);
  const std::size_t size = encoder.write(out.get());
  CHECK(size <= encoder.bound());
  return {out.get(), out.get() + size};
}

template <class T>
void round_trip(const std::vector<T>& symbols, std::uint64_t chunk_symbols) {
  const std::vector<std::uint8_t> expected = encode(symbols, chunk_symbols, SimdLevel::scalar);
  for (const SimdLevel level : levels()) {
    CHECK(encode(symbols, chunk_symbols, level) == expected);
    HuffmanDecoder decoder(level);
    CHECK(decoder.open(expected.data(), expected.size(), symbols.size()).ok());
    CHECK(decoder.arrays().size() == 1 && decoder.arrays()[0].count == symbols.size());
    std::vector<T> back(symbols.size());
    void* pointer = back.data();
    CHECK(decoder.decode_all(&pointer).ok());
    CHECK(back == symbols);
    for (const ChecksumUse use : {ChecksumUse::while_decoding, ChecksumUse::never}) {
      HuffmanDecoder other(level);
      CHECK(other.open(expected.data(), expected.size(), symbols.size(), use).ok());
      std::fill(back.begin(), back.end(), T(77));
      CHECK(other.decode_all(&pointer).ok());
      CHECK(back == symbols);
    }
    const std::size_t begin = symbols.size() / 3, end = symbols.size() - symbols.size() / 7;
    std::vector<T> part(end - begin);
    CHECK(decoder.decode(0, begin, end, part.data()).ok());
    CHECK(std::vector<T>(symbols.begin() + static_cast<std::ptrdiff_t>(begin),
                         symbols.begin() + static_cast<std::ptrdiff_t>(end)) == part);
    if (!symbols.empty()) {
      HuffmanDecoder limited(level);
      CHECK(limited.open(expected.data(), expected.size(), symbols.size() - 1).code == StatusCode::invalid_bitstream);
    }
  }
}

void repair_checksum(std::uint8_t* data, std::size_t size) {
  std::uint32_t crc = crc32(0, data, 5, SimdLevel::scalar);
  crc = crc32(crc, data + 9, size - 9, SimdLevel::scalar);
  for (int i = 0; i < 4; ++i) data[5 + i] = static_cast<std::uint8_t>(crc >> (8 * i));
}

void test_crc() {
  const std::uint8_t digits[] = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
  std::vector<std::uint8_t> bytes(130000);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i * i >> 3);
  for (const SimdLevel level : levels()) {
    CHECK(crc32(0, digits, 9, level) == 0xCBF43926);
    for (std::size_t size = 0; size < bytes.size(); size += 1 + size / 16) {
      const std::uint32_t crc = ~detail::crc32_update(~7u, bytes.data(), size);  // by table
      CHECK(crc32(7, bytes.data(), size, level) == crc);
      const std::unique_ptr<std::uint8_t[]> copy(new std::uint8_t[size]);
      CHECK(crc32_copy(7, copy.get(), bytes.data(), size, level) == crc);
      CHECK(std::equal(copy.get(), copy.get() + size, bytes.data()));
    }
  }
}

void test_round_trips() {
  std::mt19937_64 random(1);
  const double widths[] = {0.0, 0.2, 1.0, 3.0, 40.0};
  const std::size_t sizes[] = {0, 1, 2, 3, 7, 100, 4097, 30011, 140003};
  for (const double width : widths) {
    std::normal_distribution<double> normal(0.0, width + 1e-9);
    for (const std::size_t size : sizes) {
      std::vector<std::uint8_t> bytes(size);
      std::vector<std::int16_t> words(size);
      for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(static_cast<int>(normal(random)) + 128);
      for (std::int16_t& w : words) w = static_cast<std::int16_t>(100 * normal(random));
      for (const std::uint64_t chunk :
           {std::uint64_t{1}, std::uint64_t{37}, std::uint64_t{128}, std::uint64_t{1920}, std::uint64_t{1} << 28}) {
        round_trip(bytes, chunk);
        round_trip(words, chunk);
      }
    }
  }
}

// Every number of chunks that fills the lanes of a decoder once or twice or leaves some idle, and last chunks of many
// sizes; long codes, and codes so short that a look-up yields several symbols.
void test_chunk_numbers() {
  std::mt19937_64 random(8);
  for (const double width : {0.7, 40.0}) {
    std::normal_distribution<double> normal(0.0, width);
    std::vector<std::uint8_t> symbols(20 * 1920);
    for (std::uint8_t& s : symbols) s = static_cast<std::uint8_t>(static_cast<int>(normal(random)) + 128);
    for (std::size_t chunks = 1; chunks <= 20; ++chunks) {
      for (const std::size_t missing : {0, 1, 5, 160, 1000, 1919}) {
        round_trip(std::vector<std::uint8_t>(symbols.begin(), symbols.begin() + chunks * 1920 - missing), 1920);
      }
    }
  }
}

// Short codes in some parts and long ones in others, so that streams which decode several symbols a look-up are through
// at different times and take over what others have left; chunks of about the size that a look-up may write past.
void test_uneven_parts() {
  std::mt19937_64 random(9);
  for (const int parts : {2, 3, 5, 7}) {
    for (const std::size_t size : {17000, 60000}) {
      std::vector<std::uint8_t> symbols(size);
      for (std::size_t i = 0; i < size; ++i) {
        const bool noisy = i * static_cast<std::size_t>(parts) / size % 2 == 1;
        const std::uint64_t bits = random();
        symbols[i] = static_cast<std::uint8_t>(noisy ? bits % 64 : bits % 32 == 0);
      }
      for (const std::uint64_t chunk : {7, 39, 40, 41, 79, 81, 300, 1920}) round_trip(symbols, chunk);
      std::reverse(symbols.begin(), symbols.end());
      round_trip(symbols, 300);
    }
  }
}

// Counts like Fibonacci numbers make an unlimited code as long as it gets.
void test_length_limit() {
  std::vector<std::uint8_t> bytes;
  std::vector<std::int16_t> words;
  std::uint64_t a = 1, b = 1;
  for (int symbol = 0; symbol < 24; ++symbol) {
    for (std::uint64_t i = 0; i < a; ++i) {
      bytes.push_back(static_cast<std::uint8_t>(symbol));
      words.push_back(static_cast<std::int16_t>(-9 * symbol));
    }
    const std::uint64_t next = a + b;
    a = b;
    b = next;
  }
  std::shuffle(bytes.begin(), bytes.end(), std::mt19937(2));
  std::shuffle(words.begin(), words.end(), std::mt19937(3));
  round_trip(bytes, 1920);
  round_trip(words, 1920);
}

// Lengths of codes by a mask, others filling up what they leave: limits that crowd in the code's last 32nd, and lengths
// without a code.
void test_code_shapes() {
  std::mt19937_64 random(6);
  for (const unsigned mask : {0x7FEu, 0x2u, 0x4u, 0xAu, 0x12u, 0x404u, 0x42u, 0x3C0u, 0x540u, 0x7C2u}) {
    std::vector<std::uint8_t> bytes;
    unsigned left = 2048;
    std::uint8_t symbol = 3;
    for (unsigned length = 1; length <= 10; ++length) {
      if (mask >> length & 1) {
        bytes.insert(bytes.end(), 2048 >> length, symbol++);
        left -= 2048 >> length;
      }
    }
    for (unsigned length = 1; left > 255; ++length) {
      while (left >= 2048u >> length && left - (2048u >> length) >= 64) {
        bytes.insert(bytes.end(), 2048 >> length, symbol++);
        left -= 2048 >> length;
      }
    }
    for (; left > 0; --left) bytes.push_back(symbol++);
    for (int doubling = 0; doubling < 6; ++doubling) bytes.insert(bytes.end(), bytes.begin(), bytes.end());
    std::shuffle(bytes.begin(), bytes.end(), random);
    for (const std::uint64_t chunk : {39, 40, 1921, 1 << 28}) round_trip(bytes, chunk);
  }
}

// Chunks of any bytes under valid code lengths, checksum put right or not computed: the same outcome at every level.
void test_damaged_chunks() {
  std::mt19937_64 random(7);
  for (const unsigned width : {1u, 4u, 60u}) {
    std::vector<std::uint8_t> symbols(40000);
    for (std::uint8_t& s : symbols) {
      const std::uint64_t zeros = static_cast<std::uint64_t>(__builtin_ctzll(random() | std::uint64_t{1} << 40));
      s = static_cast<std::uint8_t>(std::min<std::uint64_t>(255, zeros * width + random() % width));
    }
    for (const std::uint64_t chunk : {std::uint64_t{200}, std::uint64_t{1920}, std::uint64_t{1} << 28}) {
      const std::vector<std::uint8_t> whole = encode(symbols, chunk, SimdLevel::scalar);
      for (int run = 0; run < 40; ++run) {
        const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[whole.size()]);
        std::copy(whole.begin(), whole.end(), exact.get());
        const std::size_t at = whole.size() / 4 + random() % (whole.size() / 2);
        for (std::size_t i = at; i < std::min(whole.size(), at + (run % 8 == 0 ? whole.size() / 8 : 1)); ++i) {
          exact[i] = static_cast<std::uint8_t>(random());
        }
        if (run % 2 == 0) repair_checksum(exact.get(), whole.size());
        const ChecksumUse use = run % 2 == 0 ? ChecksumUse::first : ChecksumUse::never;
        StatusCode first{};
        std::vector<std::uint8_t> decoded;
        for (const SimdLevel level : levels()) {
          HuffmanDecoder decoder(level);
          CHECK(decoder.open(exact.get(), whole.size(), symbols.size(), use).ok());
          const std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[symbols.size()]);
          void* pointer = out.get();
          const StatusCode code = decoder.decode_all(&pointer).code;
          CHECK(code == StatusCode::ok || code == StatusCode::invalid_code);
          if (level == SimdLevel::scalar) {
            first = code;
            decoded.assign(out.get(), out.get() + symbols.size());
          }
          CHECK(code == first);
          if (code == StatusCode::ok) CHECK(std::equal(decoded.begin(), decoded.end(), out.get()));
        }
      }
    }
  }
}

struct Outcome {
  StatusCode code{};
  std::vector<std::uint8_t> symbols;

  bool operator==(const Outcome& other) const { return code == other.code && symbols == other.symbols; }
};

Outcome outcome_of(const std::uint8_t* data, std::size_t size, SimdLevel level, ChecksumUse use) {
  HuffmanDecoder decoder(level);
  Outcome outcome;
  outcome.code = decoder.open(data, size, 1 << 20, use).code;
  if (outcome.code != StatusCode::ok) return outcome;
  std::vector<std::vector<std::uint8_t>> arrays;
  std::vector<void*> pointers;
  for (const ArrayShape& shape : decoder.arrays()) arrays.emplace_back(shape.count * symbol_bytes(shape.type));
  for (std::vector<std::uint8_t>& array : arrays) pointers.push_back(array.data());
  outcome.code = decoder.decode_all(pointers.data()).code;
  if (outcome.code != StatusCode::ok) return outcome;
  for (const std::vector<std::uint8_t>& array : arrays) {
    outcome.symbols.insert(outcome.symbols.end(), array.begin(), array.end());
  }
  return outcome;
}

// Every bit flipped of data of every kind: without the checksum the outcome is what it would be under one that is right.
void test_damage_unnoticed() {
  std::mt19937_64 random(10);
  std::vector<std::uint8_t> noise(120), few(150), constant(9, 4), skewed(700);
  for (std::uint8_t& s : noise) s = static_cast<std::uint8_t>(random());
  for (std::uint8_t& s : few) s = static_cast<std::uint8_t>(__builtin_popcountll(random()) / 3);
  for (std::uint8_t& s : skewed) s = static_cast<std::uint8_t>(random() % 16 == 0);
  std::vector<std::int16_t> words(90), near(120);
  for (std::int16_t& s : words) s = static_cast<std::int16_t>(random());
  for (std::int16_t& s : near) s = static_cast<std::int16_t>(-__builtin_popcountll(random()) / 4);
  std::size_t decoded = 0, wrong = 0;
  for (const std::vector<std::uint8_t>& whole :
       {encode(noise, 128, SimdLevel::scalar), encode(few, 20, SimdLevel::scalar), encode(few, 1920, SimdLevel::scalar),
        encode(constant, 20, SimdLevel::scalar), encode(skewed, 70, SimdLevel::scalar),
        encode(words, 20, SimdLevel::scalar), encode(near, 20, SimdLevel::scalar)}) {
    const Outcome good = outcome_of(whole.data(), whole.size(), SimdLevel::scalar, ChecksumUse::first);
    CHECK(good.code == StatusCode::ok);
    for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
      const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[whole.size()]);
      std::copy(whole.begin(), whole.end(), exact.get());
      exact[bit / 8] = static_cast<std::uint8_t>(exact[bit / 8] ^ 1 << bit % 8);
      std::vector<Outcome> outcomes;
      for (const SimdLevel level : levels()) {
        outcomes.push_back(outcome_of(exact.get(), whole.size(), level, ChecksumUse::never));
        for (const ChecksumUse use : {ChecksumUse::first, ChecksumUse::while_decoding}) {
          CHECK(outcome_of(exact.get(), whole.size(), level, use).code != StatusCode::ok);
        }
      }
      repair_checksum(exact.get(), whole.size());
      const Outcome expected = outcome_of(exact.get(), whole.size(), SimdLevel::scalar, ChecksumUse::first);
      for (const Outcome& outcome : outcomes) CHECK(outcome == expected);
      decoded += expected.code == StatusCode::ok;
      wrong += expected.code == StatusCode::ok && !(expected == good);
    }
  }
  CHECK(decoded > wrong && wrong > 0);
}

void test_damage() {
  std::mt19937_64 random(4);
  std::vector<std::uint8_t> symbols(3000);
  for (std::uint8_t& s : symbols) s = static_cast<std::uint8_t>(__builtin_popcountll(random()) / 3);
  const std::vector<std::uint8_t> whole = encode(symbols, 128, SimdLevel::scalar);
  const auto refused = [&](const std::vector<std::uint8_t>& data) {
    const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[data.size()]);
    std::copy(data.begin(), data.end(), exact.get());
    for (const SimdLevel level : levels()) {
      HuffmanDecoder decoder(level);
      CHECK(!decoder.open(exact.get(), data.size(), 1 << 20).ok());
    }
  };
  for (std::size_t size = 0; size < whole.size(); ++size) {
    HuffmanDecoder trusting(SimdLevel::scalar);  // the size alone tells
    CHECK(trusting.open(whole.data(), size, 1 << 20, ChecksumUse::never).code == StatusCode::truncated);
    refused({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
  }
  for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
    std::vector<std::uint8_t> damaged = whole;
    damaged[bit / 8] = static_cast<std::uint8_t>(damaged[bit / 8] ^ 1 << bit % 8);
    refused(damaged);
  }
}

// Stored arrays, whose checksum `decode_all` computes while it copies, past the caches if they are large.
template <class T>
void test_stored() {
  std::mt19937_64 random(5);
  for (const std::size_t size : {std::size_t{300}, std::size_t{1} << 20, (std::size_t{1} << 20) + 4321}) {
    std::vector<T> symbols(size);
    for (T& s : symbols) s = static_cast<T>(random());
    const std::vector<std::uint8_t> data = encode(symbols, 2048, SimdLevel::scalar);
    CHECK(data.size() > size * sizeof(T));
    for (const SimdLevel level : levels()) {
      for (std::size_t shift = 0; shift < 65; shift += 13) {
        const std::unique_ptr<T[]> out(new T[size + shift]);
        void* pointer = out.get() + shift;
        for (const std::size_t flip : {data.size(), data.size() - 1, data.size() / 2, std::size_t{6}}) {
          const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[data.size()]);
          std::copy(data.begin(), data.end(), exact.get());
          if (flip < data.size()) exact[flip] ^= 4;
          HuffmanDecoder decoder(level);
          CHECK(decoder.open(exact.get(), data.size(), size, ChecksumUse::while_decoding).ok());
          const Status status = decoder.decode_all(&pointer);
          CHECK(status.code == (flip < data.size() ? StatusCode::checksum_mismatch : StatusCode::ok));
          CHECK(flip < data.size() || std::equal(symbols.begin(), symbols.end(), out.get() + shift));
          HuffmanDecoder trusting(level);
          CHECK(trusting.open(exact.get(), data.size(), size, ChecksumUse::never).ok());
          CHECK(trusting.decode_all(&pointer).ok());
          const bool same = std::equal(symbols.begin(), symbols.end(), out.get() + shift);
          CHECK(same == (flip == data.size() || flip < 9));  // the checksum itself is no symbol
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_crc();
  test_round_trips();
  test_chunk_numbers();
  test_uneven_parts();
  test_length_limit();
  test_code_shapes();
  test_damaged_chunks();
  test_damage();
  test_damage_unnoticed();
  test_stored<std::uint8_t>();
  test_stored<std::int16_t>();
  std::printf("csrc/tests: %zu instruction-set levels, all good\n", levels().size());
}
