#include <sentencepiece_processor.h>

#include "special_text.h"
#include "text_stages.h"
#include "tokenizer_kinds.h"

namespace llama_runner {

namespace {

class SentencePieceTokenizer final : public Tokenizer {
  public:
    Result<void> open(std::string_view data) {
        const auto status = model_.LoadFromSerializedProto({data.data(), data.size()});
        if (!status.ok()) {
            return Error{std::string("damaged sentencepiece tokenizer (") + status.error_message() +
                         "); copy the file again"};
        }
        for (int id = 0; id < model_.GetPieceSize(); ++id) {
            const std::string& piece = model_.IdToPiece(id);
            if (model_.IsControl(id)) {
                add_piece("", false);
                specials_.add(piece);
                special_ids_.push_back(id);
            } else if (model_.IsByte(id)) {
                const char byte = static_cast<char>(std::strtol(piece.c_str() + 1, nullptr, 16));  // "<0x0A>"
                add_piece({&byte, 1}, false);
            } else if (model_.IsUnknown(id)) {
                add_piece(" \xE2\x81\x87 ", false);  // what SentencePiece itself writes for <unk>
            } else {
                add_piece(replaced(piece, kSpaceMark, " "), true);
            }
        }
        return {};
    }

  protected:
    Result<std::vector<int64_t>> encode_plain(std::string_view text, bool parse_special) const override {
        std::vector<int64_t> ids;
        const auto plain = [&](std::string_view part) { return encode_part(part, ids); };
        const auto special = [&](size_t index) { ids.push_back(special_ids_[index]); };
        const auto done = parse_special ? specials_.cut(text, plain, special) : plain(text);
        if (!done) return done.error();
        return ids;
    }

  private:
    Result<void> encode_part(std::string_view text, std::vector<int64_t>& ids) const {
        std::vector<int> part;
        const auto status = model_.Encode({text.data(), text.size()}, &part);
        if (!status.ok()) return Error{std::string("the text cannot be encoded (") + status.error_message() + ")"};
        ids.insert(ids.end(), part.begin(), part.end());
        return {};
    }

    sentencepiece::SentencePieceProcessor model_;
    SpecialText specials_;
    std::vector<int64_t> special_ids_;
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> open_sentencepiece(std::string_view data) {
    sentencepiece::SetMinLogLevel(100);
    auto tokenizer = std::make_unique<SentencePieceTokenizer>();
    if (auto opened = tokenizer->open(data); !opened) return opened.error();
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
}

}  // namespace llama_runner
