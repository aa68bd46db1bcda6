using System;
using System.Text;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>The words of a command, as a shell would split them.</summary>
public sealed class WordsTests
{
    [Theory]
    [InlineData("", "")]
    [InlineData(" \t ", "")]
    [InlineData("sed -u s/a/b/", "sed|-u|s/a/b/")]
    [InlineData("  a \t b  ", "a|b")]
    [InlineData("'a b' \"c d\"", "a b|c d")]
    [InlineData("a'b'\"c\"d", "abcd")]
    [InlineData("'' x \"\"", "|x|")]
    [InlineData(@"a\ b \\ \' \""", "a b|\\|'|\"")]
    [InlineData(@"'a\b' ""a\""b""", "a\\b|a\"b")]
    [InlineData("\"it's\" 'say \"x\"'", "it's|say \"x\"")]
    public void Are_split_as_a_shell_does(string text, string words) =>
        Assert.Equal(words.Length == 0 ? [] : words.Split('|'), Text.Words(text));

    [Theory]
    [InlineData("'a")]
    [InlineData("a\"b")]
    [InlineData("\"a\\\"")]
    [InlineData("a\\")]
    public void What_is_not_closed_is_wrong(string text) => Assert.Throws<FormatException>(() => Text.Words(text));

    /// <summary>Quoting each word by hand and splitting gives the words back; noise gives words or a FormatException.</summary>
    [Fact]
    public void Any_words_survive_quoting_and_noise_does_no_harm()
    {
        Random random = new(6);
        for (int round = 0; round < 20_000; round++)
        {
            string[] words = new string[random.Next(5)];
            StringBuilder line = new();
            for (int i = 0; i < words.Length; i++)
            {
                words[i] = Noise(random);
                const StringComparison Plain = StringComparison.Ordinal;
                line.Append(random.Next(2) == 0 ? $"'{words[i].Replace("'", "'\\''", Plain)}'"
                    : $"\"{words[i].Replace("\\", "\\\\", Plain).Replace("\"", "\\\"", Plain)}\"");
                line.Append(' ', random.Next(1, 3));
            }

            Assert.Equal(words, Text.Words(line.ToString()));
            try
            {
                Text.Words(Noise(random));
            }
            catch (FormatException)
            {
                continue;
            }
        }

        static string Noise(Random random) => new([.. random.GetItems<char>("ab \t'\"\\\n", random.Next(8))]);
    }
}
